#!/usr/bin/env python3
"""Talks to `gd serve` through OpenAI's Python client, as programs that were written for other servers do.

    python3 -m venv venv && venv/bin/pip install openai
    venv/bin/python scripts/ci/check_serve.py target/debug/gd MODEL
    venv/bin/python scripts/ci/check_serve.py target/debug/gd MODEL --clients 64 --seconds 60

MODEL needs a chat template and a layer that selects. Starts the server on a free port, and checks completions, chats, streams,
log-probabilities, errors, the example of the guide, and that many clients at once get the answers that each gets alone, once or
for as long as `--seconds` says. Exit code 1 where something differs or is lost.
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

import checks
from checks import check

KEY = "check"


def refused(kind, call, **arguments):
    """The error of a call that must fail with this class of the client."""
    try:
        call(**arguments)
    except kind as error:
        return error
    sys.exit(f"{arguments} is not refused with {kind.__name__}")


def completions(client, model):
    ask = {"model": model, "prompt": "It was", "max_tokens": 12, "temperature": 0}
    answer = client.completions.create(**ask, logprobs=3)
    choice = answer.choices[0]
    check(answer.usage.completion_tokens <= 12 and choice.finish_reason in ("length", "stop"), answer)
    check(len(choice.logprobs.tokens) == answer.usage.completion_tokens, choice.logprobs)
    check(all(value <= 0 for value in choice.logprobs.token_logprobs), choice.logprobs)
    streamed = "".join(part.choices[0].text for part in client.completions.create(**ask, stream=True))
    check(streamed == choice.text, repr(streamed), repr(choice.text))
    several = client.completions.create(**(ask | {"temperature": 1.0}), n=3, seed=7)
    again = client.completions.create(**(ask | {"temperature": 1.0}), n=3, seed=7)
    texts = [choice.text for choice in several.choices]
    check(texts == [choice.text for choice in again.choices] and len(texts) == 3, texts)
    if len(choice.text) > 4:
        stop = choice.text[3:5]
        stopped = client.completions.create(**ask, stop=stop).choices[0]
        check(stopped.text == choice.text[:choice.text.index(stop)] and stopped.finish_reason == "stop", stopped)


def chats(client, model):
    messages = [{"role": "user", "content": "Hi"}]
    ask = {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    message = answer.choices[0].message
    content = answer.choices[0].logprobs.content
    check(message.role == "assistant" and len(content) == answer.usage.completion_tokens, answer)
    check(all(len(token.top_logprobs) == 2 for token in content), content)
    parts = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    check(streamed == message.content, repr(streamed), repr(message.content))
    check(parts[-1].usage == answer.usage, parts[-1])
    messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": "And?"}]
    check(client.chat.completions.create(**ask).choices[0].message.content is not None)
    traced = client.chat.completions.create(**ask, extra_body={"sources": True})
    tokens = traced.choices[0].model_extra["gd"]["tokens"]
    check(tokens and all(token["sources"] for token in tokens), tokens)


def errors(client, model, url):
    ask = {"model": model, "prompt": "a"}
    check("temperature" in str(refused(openai.BadRequestError, client.completions.create, **ask, temperature=-1)))
    check(refused(openai.NotFoundError, client.completions.create, **(ask | {"model": "none"})).code == "model_not_found")
    long = refused(openai.BadRequestError, client.completions.create, **(ask | {"prompt": [1] * 100_000}))
    check(long.code == "context_length_exceeded", long)
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    check(refused(openai.AuthenticationError, stranger.models.list).code == "invalid_api_key")


def together(client, model, url, clients, seconds):
    """Many clients, each of which asks again and again until the time is over; at least once."""
    def ask(number, stream=False):
        prompt = "".join(chr(97 + (number * 7 + at * 3) % 26) for at in range(3 + number % 17))
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=16, temperature=0, stream=stream)
        return "".join(part.choices[0].text for part in answer) if stream else answer.choices[0].text

    alone = [ask(number) for number in range(clients)]
    end = time.monotonic() + seconds

    def repeat(number):
        count = 0
        while count == 0 or time.monotonic() < end:
            text = ask(number, stream=(number + count) % 2 == 0)
            check(text == alone[number], number, repr(text), repr(alone[number]))
            count += 1
        return count

    with ThreadPoolExecutor(clients) as pool:
        counts = list(pool.map(repeat, range(clients)))
    # Nothing of them is left in the server.
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        metrics = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[:1] != "#")
    check(float(metrics["gd_sequences_running"]) == 0, metrics["gd_sequences_running"])
    print(f"{clients} clients asked {sum(counts)} times in {seconds} s, each at least {min(counts)} times: every answer is "
          "the one that the client gets alone")


def guide(url):
    """The example of docs/src/serving.md, which prints an answer."""
    page = (Path(__file__).resolve().parents[2] / "docs/src/serving.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for there, here in [("http://127.0.0.1:8080", url), ('"book"', '"model"'), ('"none"', repr(KEY))]:
        check(there in code, there, code)
        code = code.replace(there, here)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "serving.md", "exec"), {})
    check(printed.getvalue(), "the example prints nothing")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("gd")
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0)
    args = parser.parse_args()
    arguments = [args.gd, "serve", args.model, "--port", "0", "--json", "--name", "model"]
    server = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env={"GD_API_KEY": KEY})
    try:
        url = json.loads(server.stdout.readline())["url"]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        check([model.id for model in client.models.list()] == ["model"])
        completions(client, "model")
        chats(client, "model")
        errors(client, "model", url)
        guide(url)
        together(client, "model", url, args.clients, args.seconds)
    finally:
        server.terminate()
        code = server.wait(timeout=60)
    check(code == 0, "exit code", code)
    print(f"{checks.count} checks of gd serve by the openai client {openai.__version__}")


if __name__ == "__main__":
    main()
