"""A chat page for a nanochat model: a server in plain asyncio, with all clients in one batch.

    python examples/chat_web.py                      the bundled model, on http://127.0.0.1:8000
    python examples/chat_web.py -m sft --port 8080   your own model

    GET  /                  the page, chat_web.html
    GET  /health            the numbers of running and waiting requests
    POST /chat/completions  {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0.8,
                            "top_k": 50, "max_tokens": 512}; only the messages are required. The
                            answer is server-sent events, as in nanochat's chat_web:
                            {"token": "Hi"}, ..., and at the end {"done": true} or
                            {"error": "message"}

This is code to copy from, not a product. It has no encryption, no accounts and no limit on the
number of clients, so by default it listens only on this machine. To serve others, put a server with
these features in front of it.
"""

import argparse
import asyncio
import json
from functools import partial
from pathlib import Path

from microvllm import LLM, SamplingParams

MODEL = Path(__file__).parent.parent / "models" / "oldbooks-d6"
PAGE = Path(__file__).with_suffix(".html")
DEFAULTS = {"temperature": 0.8, "top_k": 50, "max_tokens": 512}

MOST_BYTES = 2**18  # the largest body of a request
REQUEST_SECONDS = 10  # time limit for a client to send its request
ANSWER_SECONDS = 600  # time limit for a client to read the answer

HEAD = (
    "HTTP/1.1 {status}\r\ncontent-type: {kind}; charset=utf-8\r\ncache-control: no-store\r\n"
    "content-security-policy: default-src 'self' 'unsafe-inline'\r\nconnection: close\r\n\r\n"
)


async def send_answer(llm, prompt, params, send):
    """Generate an answer, and send each piece of text when it is ready."""
    async for event in llm.astream([prompt], params, tools=True):
        if event["text"]:
            await send({"token": event["text"]})
        if event["finish_reason"] == "error":
            await send({"error": event["stop_reason"]})
    await send({"done": True})


def read_question(llm, body: bytes) -> tuple[list[int], SamplingParams]:
    """The prompt and the sampling parameters from a request's body. Raises ValueError or
    TypeError."""
    try:
        question = json.loads(body)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(question, dict) or not isinstance(question.get("messages"), list):
        raise ValueError('give an object with a list of "messages"')
    params = {name: question.get(name, value) for name, value in DEFAULTS.items()}
    if params["top_k"] == 0:  # nanochat's value for "off"
        params["top_k"] = None
    prompt = llm.tokenizer.render_for_completion(question["messages"])
    return prompt, SamplingParams(**params)


async def read_request(reader) -> tuple[str, str, bytes]:
    """Method, path and body of a request. Raises ValueError if the input is not a request."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")
    method, path, _ = first.split(" ")
    fields = [line.lower().partition(":") for line in lines]
    lengths = [int(value) for name, _, value in fields if name == "content-length"]
    if not 0 <= sum(lengths) <= MOST_BYTES:
        raise ValueError(f"a body may have at most {MOST_BYTES} bytes")
    return method, path.partition("?")[0], await reader.readexactly(sum(lengths))


async def read_to_end(reader) -> None:
    """Wait until the client closes the connection."""
    while await reader.read(2**12):
        pass


async def answer(llm, body: bytes, reader, writer) -> None:
    """Stream the answer to a question, until its end or until the client disconnects."""

    async def send(event: dict) -> None:
        writer.write(f"data: {json.dumps(event)}\n\n".encode())
        await writer.drain()  # a slow client delays only its own stream

    async def send_all() -> None:
        try:
            await send_answer(llm, *question, send)
        except (ValueError, TypeError) as error:  # a prompt that is too long, for example
            await send({"error": str(error)})

    # in another thread, because encoding a long text takes a while
    question = await asyncio.to_thread(read_question, llm, body)
    writer.write(HEAD.format(status="200 OK", kind="text/event-stream").encode())
    tasks = [asyncio.ensure_future(work) for work in (send_all(), read_to_end(reader))]
    try:
        await asyncio.wait(tasks, timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()  # this aborts the request if it is not done
        await asyncio.gather(*tasks, return_exceptions=True)


async def serve_client(llm, reader, writer) -> None:
    """Read one request and answer it."""

    def respond(status: str, kind: str, text: str) -> None:
        writer.write((HEAD.format(status=status, kind=kind) + text).encode())

    try:
        try:
            request = await asyncio.wait_for(read_request(reader), REQUEST_SECONDS)
            match request:
                case "POST", "/chat/completions", body:
                    await answer(llm, body, reader, writer)
                case "GET", "/", _:
                    respond("200 OK", "text/html", PAGE.read_text(encoding="utf-8"))
                case "GET", "/health", _:
                    stats = llm.stats()
                    counts = {name: stats[name] for name in ("running", "waiting", "requests")}
                    respond("200 OK", "application/json", json.dumps({"status": "ok"} | counts))
                case _:
                    respond("404 Not Found", "text/plain", "there is no such page")
        except (ValueError, TypeError, asyncio.LimitOverrunError) as error:
            respond("400 Bad Request", "application/json", json.dumps({"error": str(error)}))
        await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError, asyncio.TimeoutError):
        pass  # the client has disconnected
    finally:
        writer.close()


async def serve(llm, host: str, port: int) -> None:
    """Serve until the task is cancelled."""
    await asyncio.to_thread(llm.warm)  # without this, the first answer would take seconds
    server = await asyncio.start_server(partial(serve_client, llm), host, port)
    port = server.sockets[0].getsockname()[1]  # with --port 0, the system has chosen one
    print(f"http://{host}:{port}", flush=True)
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-m", "--model", default=str(MODEL), help="a path or name, as for LLM")
    parser.add_argument("--host", default="127.0.0.1", help="an address of this machine")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    args = parser.parse_args()
    with LLM(args.model) as llm:
        try:
            asyncio.run(serve(llm, args.host, args.port))
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
