"""nanochat's calculator: what a model writes between `<|python_start|>` and `<|python_end|>`.

nanochat hands the text of a model to Python's eval; we only let Python parse it, and compute the
few kinds of nodes a calculator needs ourselves. The idea and every quirk are nanochat's
(engine.py), because its models were trained on these answers.
"""

import ast
import operator
import warnings

from ..engine import LLM, Request
from ..scheduler import Scheduler, Sequence
from ..tokenizer import IncrementalDecoder, Text, Tokenizer

# the four marks of a tool call, and what a text shows in their place: `45+54` = 99
_MARKS = {
    "<|python_start|>": "`", "<|python_end|>": "`",
    "<|output_start|>": " = ", "<|output_end|>": " ",
}  # fmt: skip

# they bound all work and memory. the parser is the tightest: it recurses in C, where a stack that
# overflows kills the process. these fit into a thread with 256 KiB of stack
_MAX_CHARACTERS = 1024
_MAX_PARENTHESES = 50

_ARITHMETIC = frozenset("0123456789*+-/.() ")
_TEXT = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'\"()._ ")

# they could not hurt us, but nanochat gives no answer to text with these in it, so neither do we
_FORBIDDEN = (
    "__ import exec eval compile open file input globals locals vars dir "
    "getattr setattr delattr hasattr"
).split()

# no power: nanochat refuses `**`, and it is the one operation that makes numbers explode
_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip

# methods of a string (count: of a tuple and a list too) that never make more of what they are
# given. so no join, center, ljust, rjust, zfill, expandtabs: a few of those fill any memory
_METHODS = (
    "count lower upper casefold capitalize title swapcase strip lstrip rstrip "
    "removeprefix removesuffix split"
).split()


def calculate(expression: str) -> str | None:
    """The answer of nanochat's calculator as text, or None if it has none. Never fails.

    Commas are dropped first, everywhere (`1,000*2`; also in `'a,b'.count(',')`, which becomes
    `'ab'.count('')`, 3). Then there are two forms, told apart by their characters:

    - arithmetic, of digits and `+ - * / // . ( )`: numbers, `()` and `...` as Python has them,
      so `10/5` is 2.0, `7//2` is 3, `1/0` nothing. There is no `**`.
    - text, which must contain `.count(` and no forbidden word: strings of ASCII letters, digits,
      spaces and `. _ ( )`, and the methods of `_METHODS`: `'Strawberry'.lower().count('r')`.

    Any error is no answer. Beyond nanochat we refuse, on purpose: more than 1024 characters or 50
    opening parentheses; and in the text form every other method, keywords (`not`, `if`, `for`),
    True, None, b'' and f'' strings, methods not called.
    """
    if len(expression) > _MAX_CHARACTERS or expression.count("(") > _MAX_PARENTHESES:
        return None
    expression = expression.replace(",", "")
    if not _ARITHMETIC.issuperset(expression):
        if not _TEXT.issuperset(expression) or ".count(" not in expression:
            return None
        if any(word in expression.lower() for word in _FORBIDDEN):
            return None
    try:
        return _answer(expression)
    except Exception:  # whatever Python has against an expression, the answer is nothing
        try:
            _answer(expression)
        except Exception:
            return None
        raise  # from outside, such as a signal: it is not raised again when we ask again


def _answer(expression: str) -> str:
    """The value of an expression as text; any exception means that there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `1if` makes the parser itself warn
        tree = ast.parse(expression.lstrip(" "), mode="eval")
    return str(_evaluate(tree.body))


def _evaluate(root: ast.expr) -> object:
    """The value of a parsed expression; any exception means that there is none.

    From the leaves up, since a long sum is a tree too deep for recursion. Numbers stay small with
    no check of their own: + - * and // never give an int more digits than its operands have
    together, so no value has more digits than the expression has characters. Strings cannot be
    repeated or added, as no expression may have both quotes and operators.
    """
    values = {}
    for node in reversed([*ast.walk(root)]):  # children before parents
        match node:
            case ast.Constant(value=value) if type(value) in (int, float, str, type(...)):
                pass
            case ast.Tuple(elts=[]):  # no other: there are no commas
                value = ()
            case ast.UnaryOp(op=op, operand=operand):
                value = _OPERATORS[type(op)](values[operand])
            case ast.BinOp(op=op, left=left, right=right):
                value = _OPERATORS[type(op)](values[left], values[right])
            case ast.Attribute(value=owner, attr=name) if name in _METHODS:
                value = getattr(values[owner], name)
            case ast.Call(func=func, args=args):  # only a method of _METHODS can be callable
                value = values[func](*[values[argument] for argument in args])
            case ast.operator() | ast.unaryop() | ast.expr_context():
                continue  # `+` or `Load`, which are nodes too
            case _:
                raise ValueError(f"{type(node).__name__} is nothing for a calculator")
        values[node] = value
    if callable(value):
        raise ValueError("a method that was not called")
    return value


class Calculator:
    """The calculator at work in one sample: say each token to `push`, force what it answers.

    Like nanochat's it starts outside a block, whatever the prompt contains. Where the tokenizer
    lacks one of the four marks of a tool call, nothing is ever forced.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._marks = [tokenizer.special_tokens.get(name) for name in _MARKS]
        self._block: list[int] | None = None  # ids of the open block, None outside
        self.calls: list[dict[str, str | None]] = []  # of each block its text and the answer

    def push(self, token_id: int) -> list[int]:
        """Note the next token of the sequence, sampled or forced; returns the ids to force next,
        the whole output block or none. They go before anything sampled, a stop token too, and are
        pushed like any other."""
        if None in self._marks:
            return []
        python_start, python_end, output_start, output_end = self._marks
        if token_id == python_start:  # also inside a block, which begins anew
            self._block = []
        elif self._block is not None and token_id == python_end:
            # special tokens decode to their names, so they spoil an expression, as in nanochat
            call = self._tokenizer.decode(self._block)
            result = calculate(call)
            self.calls.append({"call": call, "result": result})
            self._block = None
            if result is not None:
                return [output_start, *self._tokenizer.encode(result), output_end]
        elif self._block is not None:
            self._block.append(token_id)
        return []


class CalculatorScheduler(Scheduler):
    """A Scheduler of sequences that are continued from outside."""

    def force(self, seq: Sequence, token_ids: list[int]) -> None:
        """Continue a sequence, as far as its length allows, with tokens that nobody samples; they
        are computed like a chunk of prompt."""
        token_ids = token_ids[: seq.max_length - len(seq.tokens)]
        seq.num_given = len(seq.tokens) + len(token_ids)
        seq.tokens.extend(token_ids)
        self.num_tokens += len(token_ids)
        self.blocks.events.force(seq)
        self.end([seq])


class ToolDecoder(IncrementalDecoder):
    """A decoder that shows where a tool was called and what it answered."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        special = tokenizer.special_tokens
        self._shown = {special[name]: mark for name, mark in _MARKS.items() if name in special}

    def push(self, token_id: int) -> str:
        """As in the core, but a mark of a tool call is shown, and ends an unfinished character."""
        if token_id in self._shown:
            return self.flush() + self._shown[token_id]
        return super().push(token_id)


class CalculatorText(Text):
    """A text in which the calculator writes, where it was asked for."""

    calculator: Calculator | None = None

    def restart(self) -> None:
        super().restart()
        if self.request.options.get("tools"):
            self.calculator, self.decoder = Calculator(self.tokenizer), ToolDecoder(self.tokenizer)
        self.forced: set[int] = set()  # indices of the output tokens that it wrote

    def react(self, seq: Sequence, token: int, scheduler: CalculatorScheduler) -> None:
        super().react(seq, token, scheduler)
        if forced := self.calculator.push(token) if self.calculator else []:
            # what follows the token already was written before a restart
            if seq.finish_reason is None and self.num_read == len(seq.output):
                scheduler.force(seq, forced)
            stop = min(self.num_read + len(forced), len(seq.output))
            self.forced.update(range(self.num_read, stop))

    def mask(self, start: int, stop: int) -> list[int]:
        """Of the output tokens [start, stop): 0 for those that the calculator wrote, else 1."""
        return [int(i not in self.forced) for i in range(start, stop)]

    def event(self, seq: Sequence) -> dict | None:
        start = self.num_sent_tokens
        event = super().event(seq)
        return event and event | {"mask": self.mask(start, self.num_sent_tokens)}


class CalculatorLLM(LLM):
    """An engine that runs nanochat's calculator where the model calls it: `tools=True`, as chat has
    it by default.

    Then a text shows each call and its result, `45+54` = 99, and stop strings are searched in what
    is shown, so that no text has one in it. Outputs have for each sample a mask, 0 for the tokens
    that were forced, else 1 (the events of a stream have it for their tokens), and tool_calls, in
    their order: {"call": "45+54", "result": "99"}. The result is the calculator's, None if it has
    none, also where the sample ended before all of it was written.
    """

    request_options = LLM.request_options | {"tools"}

    def chat(self, messages, sampling_params=None, use_tqdm=True, *, tools=True, **options):
        return super().chat(messages, sampling_params, use_tqdm, tools=tools, **options)

    def watches(self, request: Request) -> bool:
        return bool(request.options.get("tools")) or super().watches(request)

    def _make_sequence(self, request: Request) -> Sequence:
        seq = super()._make_sequence(request)
        end = self.tokenizer.special_tokens.get("<|python_end|>")
        if request.options.get("tools") and end is not None:
            seq.tool_ids = frozenset([end])  # what comes after them is not the model's
        return seq

    def sample_output(self, request: Request, seq: Sequence) -> dict:
        found, text = super().sample_output(request, seq), request.texts.get(seq.sample_id)
        count = len(seq.output)
        return found | {
            "mask": text.mask(0, count) if text else [1] * count,
            "tool_calls": text.calculator.calls if text and text.calculator else [],
        }


PARTS = {"llm": CalculatorLLM, "scheduler": CalculatorScheduler, "text": CalculatorText}
