"""The progress bar of `generate`."""

from test_engine import build, greedy, ids


def test_progress_is_shown_on_a_terminal_only(capsys, monkeypatch):
    with build() as llm:
        llm.generate([ids(5)], greedy(2))
        assert capsys.readouterr().err == ""  # not a terminal
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        llm.generate([ids(5)], greedy(2), use_tqdm=False)
        assert capsys.readouterr().err == ""
        llm.generate([ids(5)], greedy(2))
        assert "tokens/s" in capsys.readouterr().err
