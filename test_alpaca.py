"""Throughput on Alpaca's instructions: python test_alpaca.py --num-prompts 512 --max-tokens 64

The instructions come from --prompts-file, else from the tatsu-lab/alpaca data set where the
`datasets` package can reach it, else from the bundled file. The name is the original's: this is
a script, and pytest does not collect it.
"""

from microvllm.cli import commands, flags, terminal


def main() -> None:
    parser = terminal.Parser(description="Throughput on Alpaca's instructions.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the report")
    flags.add_flags(parser, flags.ALPACA)
    parser.set_defaults(command=commands.bench)
    terminal.execute(parser.parse_args())


if __name__ == "__main__":
    main()
