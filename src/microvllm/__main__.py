try:
    from importlib.util import find_spec

    if not find_spec("microvllm.cli"):
        remedy = "reinstall microvllm (pip install --force-reinstall microvllm)"
        raise SystemExit(f"the command line is in microvllm/cli, which is not there: {remedy}")

    from .cli import main

    main()
except KeyboardInterrupt:  # before a command runs
    raise SystemExit(130) from None
