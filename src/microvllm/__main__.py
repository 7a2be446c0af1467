try:
    from importlib.util import find_spec

    if not find_spec("microvllm.cli"):
        from .environment import REINSTALL

        raise SystemExit(f"the command line needs microvllm/cli, which is missing: {REINSTALL}")

    from .cli import main

    main()
except KeyboardInterrupt:  # before a command has started
    raise SystemExit(130) from None
