"""nanochat's chat_eval as a command: python -m microvllm.nanochat -i sft -a "ARC-Easy|GSM8K"."""

import argparse

from .chat_eval import MAX_PROMPT, evaluate_chat
from .tasks import TASKS


def main(words: list[str] | None = None) -> None:
    """Run nanochat's chat_eval, with the same flags."""
    from .. import LLM

    parser = argparse.ArgumentParser(prog="python -m microvllm.nanochat")
    add_flags(parser)
    flags = parser.parse_args(words)
    names = list(TASKS) if flags.task_name is None else flags.task_name.split("|")
    try:
        device = flags.device_type or "auto"
        with LLM.from_nanochat(
            flags.source,
            flags.model_tag,
            flags.step,
            device=device,
            max_model_len=MAX_PROMPT + flags.max_new_tokens + 1,
        ) as llm:
            accuracies = evaluate_chat(
                llm,
                names,
                data=flags.data,
                max_problems=flags.max_problems,
                run_code=flags.run_code,
                num_samples=flags.num_samples,
                max_new_tokens=flags.max_new_tokens,
                temperature=flags.temperature,
                top_k=flags.top_k,
            )
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        parser.error(str(error))
    for name, accuracy in accuracies["results"].items():
        print(f"{name} accuracy: {100 * accuracy:.2f}%")
    if len(accuracies["results"]) == len(TASKS):
        print(f"ChatCORE metric: {accuracies['chatcore_metric']:.4f}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of nanochat's script, and two more."""
    add = parser.add_argument
    add("-i", "--source", required=True, help="source of the model: sft or rl")
    add("-a", "--task-name", help="a task, or several separated by | (default: all)")
    add("-t", "--temperature", type=float, default=0.0)
    add("-m", "--max-new-tokens", type=int, default=512)
    add("-n", "--num-samples", type=int, default=1)
    add("-k", "--top-k", type=int, default=50)
    add("-b", "--batch-size", type=int, help="has no effect: all problems are one batch")
    add("-g", "--model-tag", help="model tag to load")
    add("-s", "--step", type=int, help="step to load")
    add("-x", "--max-problems", type=int, help="the most problems of each task")
    add("--device-type", default="", help="cuda, cpu or mps")
    add("--data", help="a folder with the tasks' rows (default: nanochat's task_data)")
    add("--run-code", action="store_true", help="allow HumanEval to run what the model writes")


if __name__ == "__main__":
    main()
