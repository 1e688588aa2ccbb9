#!/usr/bin/env python3
"""Tests the chat page of `gd serve` in headless Chromium: sends messages, and compares the page with the server's answers.

    python3 -m venv venv && venv/bin/pip install websockets
    venv/bin/python scripts/ci/check_chat_page.py target/debug/gd MODEL

MODEL needs a chat template and a layer that selects. Needs Chromium (Debian: chromium), in $CHROMIUM or on the path. The
exit code is 1 if a check fails.
"""

import json
import subprocess
import sys
import urllib.request

import checks
from checks import check
from viewer_browser import Browser, find_chromium

KEY = "check"


def ask(url, messages):
    """The answer of the server to a chat, with the sources of its tokens."""
    body = {"messages": messages, "temperature": 0, "max_tokens": 8, "sources": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]


def fill(tab, name, value):
    tab.js(f"document.getElementById({json.dumps(name)}).value = {json.dumps(value)}")


def send(tab, text, turn):
    """Types a message, sends it, and returns the tokens of the answer as the page shows them."""
    tab.js("document.getElementById('text').focus()")
    tab.type(text)
    tab.press("Enter")
    answers = f"document.querySelectorAll('.assistant').length === {turn}"
    tab.wait(f"{answers} && !document.getElementById('send').hidden")
    return tab.js("[...document.querySelectorAll('.assistant')].at(-1).querySelectorAll('.token').length ? "
                  "[...[...document.querySelectorAll('.assistant')].at(-1).querySelectorAll('.token')]"
                  ".map((token) => token.textContent) : null")


def page(tab, url):
    tab.wait("document.getElementById('model').textContent === 'gd'")
    # Without the key, the server refuses, and the page says so.
    fill(tab, "temperature", "0")
    fill(tab, "max", "8")
    send(tab, "Hi", 1)
    check(tab.js("document.querySelector('.error').textContent").startswith("the request has no valid API key"))
    tab.errors.clear()
    tab.js("document.getElementById('reset').click()")
    fill(tab, "key", KEY)
    tokens = send(tab, "Hi <b>", 1)
    first = [{"role": "user", "content": "Hi <b>"}]
    choice = ask(url, first)
    expected = [token["text"] for token in choice["gd"]["tokens"]]
    check(tokens == expected, tokens, expected)
    check(tab.js("document.querySelector('.user').textContent") == "Hi <b>")
    # The last word, and where it was read from.
    tab.js("[...document.querySelectorAll('.assistant .token')].at(-1).click()")
    sources = choice["gd"]["tokens"][-1]["sources"]
    rows = tab.js("[...document.querySelectorAll('#rows tr')].map((row) => [...row.children].map((c) => c.textContent))")
    check(len(rows) == len(sources), rows)
    for row, source in zip(rows, sources):
        position = "none" if source["position"] is None else str(source["position"])
        check(row[:3] == [str(source["layer"]), str(source["head"]), position], row, source)
    marked = tab.js("[...document.querySelectorAll('#context .token')].flatMap((t, i) => t.matches('.read') ? [i] : [])")
    check(marked == sorted({s["position"] for s in sources if s["position"] is not None}), marked, sources)
    # The next turn goes on from the first one.
    tokens = send(tab, "And?", 2)
    chat = [*first, {"role": "assistant", "content": choice["message"]["content"]}, {"role": "user", "content": "And?"}]
    expected = [token["text"] for token in ask(url, chat)["gd"]["tokens"]]
    check(tokens == expected, tokens, expected)
    tab.js("document.getElementById('reset').click()")
    check(tab.js("document.querySelectorAll('.message').length") == 0)
    check(all(request.startswith(url) or request.startswith("data:") for request in tab.requests), tab.requests)
    check(not tab.errors, tab.errors)


def main():
    program, model = sys.argv[1:]
    browser = find_chromium()
    arguments = [program, "serve", model, "--port", "0", "--json", "--name", "gd"]
    server = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env={"GD_API_KEY": KEY})
    try:
        url = json.loads(server.stdout.readline())["url"]
        with Browser(browser) as running:
            # The page asks for the models before there is a key, and shows the name that it has then.
            tab = running.open(url, ready="document.getElementById('form')")
            page(tab, url)
    finally:
        server.terminate()
        server.wait(timeout=60)
    print(f"{checks.count} checks of the chat page")


if __name__ == "__main__":
    main()
