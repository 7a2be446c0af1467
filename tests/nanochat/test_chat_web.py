"""The chat page of examples/chat_web.py, whose core docs/NANOCHAT.md shows: real clients, one that
hangs up, one that reads nothing, and a browser."""

import asyncio
import http.client
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial

import pytest
from helpers.concurrency import run, settled, until
from helpers.goldens import MODEL, ROOT
from helpers.nanochat_engines import code_blocks

from examples import chat_web
from microvllm import LLM, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTIONS = ["Who wrote Dracula?", "What is the capital of France?", "Who wrote Emma?"]


@pytest.fixture(scope="module")
def llm():
    with LLM(MODEL, plain=True, num_blocks=400) as llm:
        yield llm


def body(text: str, **options) -> bytes:
    asked = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24}
    return json.dumps(asked | options).encode()


def post(content: bytes, path: str = "/chat/completions") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def events(text: str) -> list[dict]:
    """Those of an answer's body."""
    return [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n") if part]


def joined(found: list[dict]) -> str:
    assert found[-1] == {"done": True} and len(found) > 4
    return "".join(event["token"] for event in found[:-1])


@asynccontextmanager
async def served(llm):
    """A function that opens a connection to a server in this process."""
    server = await asyncio.start_server(partial(chat_web.serve_client, llm), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield partial(asyncio.open_connection, "127.0.0.1", port)
    finally:
        server.close()


async def asked(connect, request: bytes) -> tuple[str, str]:
    """Head and body of the answer to a request."""
    reader, writer = await connect()
    writer.write(request)
    head, _, found = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return head, found


def answers(llm, questions: list[str]) -> list[str]:
    """What the model answers without a server."""
    turns = [[{"role": "user", "content": text}] for text in questions]
    params = SamplingParams(temperature=0, max_tokens=24, top_k=50)
    return [output["text"] for output in llm.chat(turns, params, use_tqdm=False)]


def test_the_core_of_the_example_is_that_of_the_page():
    source = (ROOT / "examples" / "chat_web.py").read_text(encoding="utf-8")
    (shown,) = [block for block in code_blocks("python") if "send_answer" in block]
    assert shown in source


def test_clients_are_answered_in_one_batch_and_one_that_hangs_up_is_aborted(llm, monkeypatch):
    expected = answers(llm, QUESTIONS)
    rows, launch = [], llm.runner.launch

    def noted(plan):
        rows.append(len(plan.chunks))
        launch(plan)

    monkeypatch.setattr(llm.runner, "launch", noted)
    before = llm.stats()["aborted_requests"]

    async def main():
        async with served(llm) as connect:
            # this one would write for minutes
            with monkeypatch.context() as patch:
                endless = partial(SamplingParams, ignore_eos=True)
                patch.setattr(chat_web, "SamplingParams", endless)
                reader, writer = await connect()
                writer.write(post(body("Tell me a story.", max_tokens=400)))
                await reader.readuntil(b"data: ")
            calls = [asked(connect, post(body(text))) for text in QUESTIONS]
            tasks = asyncio.gather(*calls)
            await until(lambda: max(rows) == 4)
            writer.close()
            found = await tasks
            await until(lambda: llm.stats()["aborted_requests"] == before + 1)
            for (head, text), answer in zip(found, expected, strict=True):
                assert head.startswith("HTTP/1.1 200") and "text/event-stream" in head
                assert joined(events(text)) == answer

    run(main())
    settled(llm)


def test_a_client_that_reads_nothing_holds_up_no_other(llm, monkeypatch):
    (expected,) = answers(llm, QUESTIONS[:1])
    is_full = asyncio.Event()

    async def never(writer):
        await asyncio.Event().wait()

    real = asyncio.StreamWriter.drain

    async def drain(writer):  # as with a full buffer, for the client that came first
        if not is_full.is_set():
            is_full.set()
            slow.append(writer)
        await (never(writer) if writer in slow else real(writer))

    slow: list = []
    monkeypatch.setattr(asyncio.StreamWriter, "drain", drain)

    async def main():
        async with served(llm) as connect:
            _, writer = await connect()
            writer.write(post(body("Tell me a story.", max_tokens=400)))
            await until(is_full.is_set)
            _, text = await asked(connect, post(body(QUESTIONS[0])))
            assert joined(events(text)) == expected
            writer.close()

    run(main())
    settled(llm)


def test_an_answer_that_takes_too_long_is_cut_and_aborted(llm, monkeypatch):
    before = llm.stats()["aborted_requests"]
    monkeypatch.setattr(chat_web, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(chat_web, "SamplingParams", partial(SamplingParams, ignore_eos=True))

    async def main():
        async with served(llm) as connect:
            _, text = await asked(connect, post(body("Tell me a story.", max_tokens=900)))
            assert {"done": True} not in events(text)

    run(main())
    settled(llm)
    assert llm.stats()["aborted_requests"] == before + 1


@pytest.mark.parametrize(
    ("request_bytes", "status", "told"),
    [
        (b"GET /none HTTP/1.1\r\n\r\n", 404, "no such page"),
        (b"nonsense\r\n\r\n", 400, "unpack"),
        (post(b"{"), 400, "Expecting"),
        (post(b"[" * 100_000), 400, "nested too deeply"),
        (post(b"[]"), 400, "messages"),
        (post(b'{"messages": []}'), 400, "no user message"),
        (post(b'{"messages": [{"role": "root", "content": "x"}]}'), 400, "root"),
        (post(body("x", temperature=None)), 400, "temperature"),
        (post(body("x", max_tokens=-1)), 400, "max_tokens"),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400, "262144 bytes"),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 400, "262144 bytes"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000 + b"\r\n\r\n", 400, "limit"),
        (post(body("many words " * 5000)), 200, "10006 tokens, but max_model_len is 1024"),
    ],
)  # fmt: skip
def test_a_request_that_makes_no_sense_is_refused(llm, request_bytes, status, told):
    async def main():
        async with served(llm) as connect:
            head, text = await asked(connect, request_bytes)
            assert head.startswith(f"HTTP/1.1 {status} ") and told in text
            assert (await asked(connect, b"GET /health HTTP/1.1\r\n\r\n"))[1].startswith("{")

    run(main())
    assert llm.is_finished()


def test_the_page_loads_nothing_from_elsewhere_and_shows_texts_only(llm):
    async def main():
        async with served(llm) as connect:
            return await asked(connect, b"GET / HTTP/1.1\r\n\r\n")

    head, page = run(main())
    assert "default-src 'self'" in head and "text/html" in head
    assert "://" not in page and "innerHTML =" not in page and "textContent" in page


@pytest.fixture(scope="module")
def server():
    """The example as a program of its own: its port."""
    command = [sys.executable, str(ROOT / "examples" / "chat_web.py"), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield int(process.stdout.readline().rpartition(":")[2])
        finally:
            process.terminate()


def health(port: int) -> dict:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/health")
    return json.loads(connection.getresponse().read())


@pytest.mark.slow
def test_the_program_answers_real_clients(server, llm):
    expected = answers(llm, QUESTIONS)

    def client(text: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", server, timeout=60)
        connection.request("POST", "/chat/completions", body(text))
        response = connection.getresponse()
        assert response.status == 200
        return joined(events(response.read().decode()))

    def leaver() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server, timeout=60)
        connection.request("POST", "/chat/completions", body("Tell me a story.", temperature=1.5))
        connection.getresponse().read(7)
        connection.close()

    with ThreadPoolExecutor(12) as pool:
        leavers = [pool.submit(leaver) for _ in range(4)]
        found = [*pool.map(client, QUESTIONS * 3)]
        for task in leavers:
            task.result()
    assert found == expected * 3
    for _ in range(600):
        if health(server)["running"] == 0:
            break
        time.sleep(0.1)
    assert health(server)["running"] == health(server)["waiting"] == 0


STOPS = """() => {
    const stop = document.querySelector("#stop"), messages = document.querySelector("#messages");
    new MutationObserver(() => {
        if (!stop.disabled && messages.lastElementChild.innerText) {
            window.isStopped = true;
            stop.click();
        }
    }).observe(messages, {subtree: true, childList: true, characterData: true});
}"""


@pytest.mark.slow
def test_a_browser_chats_with_the_program(server, browser, llm):
    (expected,) = answers(llm, ["Who wrote Dracula?"])
    page = browser.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text))
    # greedily, so that the answer is known
    page.route(
        "**/chat/completions",
        lambda route: route.continue_(
            post_data=json.dumps(json.loads(route.request.post_data) | {"temperature": 0})
        ),
    )
    page.goto(f"http://127.0.0.1:{server}/")
    for turn in range(2):
        page.fill("input", "Who wrote Dracula?")
        page.click("text=Send")
        page.wait_for_selector("button:text('Send'):enabled")
        texts = page.locator("#messages p").all_inner_texts()
        assert len(texts) == 2 * turn + 2 and texts[0] == "Who wrote Dracula?"
    assert texts[1] == expected and texts[3]
    # the Stop button, at the first words of the answer: a click of the test may come too late
    page.unroute("**/chat/completions")
    page.evaluate(STOPS)
    page.fill("input", "Tell me a long story in the manner of Charles Dickens.")
    page.click("text=Send")
    page.wait_for_selector("button:text('Send'):enabled")
    assert page.evaluate("() => window.isStopped")
    for _ in range(100):
        if health(server)["running"] == 0:
            break
        time.sleep(0.1)
    assert health(server)["running"] == 0
    assert not [text for text in troubles if "favicon" not in text and "404" not in text]
    page.close()
