"""The web page in a real Chromium, over a real swarm.

With PAGE_PICTURES=docs/images the pictures of the pages are made anew.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, FLAGS
from gateways import gateway, openai_client, pages_used, wait_for_no_pages
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Locator,
    Page,
    Route,
    expect,
    sync_playwright,
)

from planetserve.gateway.server import Address
from planetserve.testing.swarm import LocalSwarm

QUESTION = "What is a list?"
HOSTILE_NAME = '<img src=x onerror="document.title=1">'
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1440, "height": 900}
MAX_PICTURE_BYTES = 300_000

OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def demo_swarm() -> Iterator[LocalSwarm]:
    with LocalSwarm("demo", []) as swarm:
        swarm.add_servers(
            [
                ("0:3", {"public_name": "alice"}),
                ("3:8", {"public_name": "bob"}),
                ("2:6", {"public_name": "carol"}),
                ("6:8", {"public_name": "dave"}),
            ]
        )
        yield swarm


@pytest.fixture(scope="module")
def address(demo_swarm: LocalSwarm) -> Iterator[Address]:
    with gateway(demo_swarm, max_warm_sessions=0) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context(viewport=DESKTOP)
    yield made
    made.close()


@pytest.fixture
def errors() -> list[str]:
    """What went to the console; a test must leave it empty."""
    return []


@pytest.fixture
def open_page(context: BrowserContext, errors: list[str]) -> Iterator[OpenPage]:
    """Opens the page in a new tab. Its answers have temperature 0 and the given length."""

    def opened(address: Address, max_tokens: int = 24, **settings: Any) -> Page:
        page = context.new_page()
        if settings:
            page.emulate_media(**settings)

        def saw(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                errors.append(message.text)

        def ask(route: Route) -> None:
            asked = route.request.post_data_json
            asked |= {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
            route.continue_(post_data=json.dumps(asked))

        page.on("console", saw)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.route("**/v1/chat/completions", ask)
        page.goto(address.url)
        return page

    yield opened
    assert errors == []


def send(page: Page, text: str = QUESTION) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def done(page: Page) -> None:
    """Wait for the end of the answer."""
    expect(page.get_by_role("button", name="Stop")).to_be_hidden(timeout=60_000)
    expect(page.locator(".message.running")).to_have_count(0)


def answers(page: Page) -> Locator:
    return page.locator(".message.assistant > .text")


def wanted(address: Address, max_tokens: int, *turns: str) -> str:
    """The words of the answer that the API gives."""
    roles = ("user", "assistant")
    messages: Any = [
        {"role": roles[place % 2], "content": text} for place, text in enumerate(turns)
    ]
    with openai_client(address) as client:
        found = client.chat.completions.create(
            model="demo", messages=messages, temperature=0, max_tokens=max_tokens,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
    return found.choices[0].message.content or ""


def words(text: str) -> str:
    """`text` without white space and what Markdown may take for its own."""
    return re.sub(r"[\s*_`#>|~\\-]", "", text)


def check_accessible(page: Page) -> None:
    """axe finds nothing serious."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    serious = [
        (one["id"], [node["target"] for node in one["nodes"]])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == []


def test_an_answer_streams_and_shows_its_servers(open_page: OpenPage, address: Address) -> None:
    page = open_page(address)
    expect(page.locator("#health-text")).to_have_text("4 servers")
    expect(page.locator(".server[data-state=ready]")).to_have_count(4)
    send(page)
    done(page)
    assert words(answers(page).inner_text()) == words(wanted(address, 24, QUESTION))
    footer = page.locator(".message.assistant .footer")
    expect(footer).to_contain_text("24 tokens")
    expect(footer).to_contain_text("tokens/s")
    assert footer.locator(".chip").first.inner_text().strip() == "alice 0–2"
    hops = page.locator(".way .hop")
    assert hops.count() == footer.locator(".chip").count() + 1  # and the gateway
    expect(page.locator(".way .hop .ms").first).to_contain_text("ms")
    expect(page.locator(".server .tag").first).to_have_text("in use")
    expect(page.get_by_role("status")).to_have_text("The answer has ended, 24 tokens.")


def test_names_that_servers_give_themselves_are_text(open_page: OpenPage, address: Address) -> None:
    def rename(route: Route) -> None:
        found = route.fetch().json()
        for server in found["servers"]:
            server |= {"name": HOSTILE_NAME, "version": "9" * 64, "quant_type": HOSTILE_NAME}
        found["changes"] = [
            {"at_s": 1.0, "reason": HOSTILE_NAME, "peer_ids": ["x"], "text": HOSTILE_NAME * 9}
        ]
        route.fulfill(json=found)

    page = open_page(address)
    page.route("**/swarm?*", rename)
    expect(page.locator(".server strong").first).to_have_text(HOSTILE_NAME, timeout=20_000)
    expect(page.locator(".event p")).to_have_text(HOSTILE_NAME * 9)
    assert page.locator("#swarm img").count() == 0
    assert page.title() == "PlanetServe"
    swarm = page.locator("#swarm")
    assert swarm.evaluate("one => one.scrollWidth <= one.clientWidth")


def test_escape_and_the_button_stop_an_answer_on_the_servers(
    open_page: OpenPage, address: Address, demo_swarm: LocalSwarm
) -> None:
    page = open_page(address, max_tokens=1900)
    for stop in (
        lambda: page.keyboard.press("Escape"),
        lambda: page.get_by_role("button", name="Stop").click(),
    ):
        send(page)
        expect(answers(page).last).to_contain_text("is")
        assert pages_used(demo_swarm)
        stop()
        done(page)
        expect(page.locator(".message.assistant .footer").last).to_contain_text("stopped")
        wait_for_no_pages(demo_swarm)


def test_regenerate_edit_copy_and_conversations_that_last(
    open_page: OpenPage, address: Address, context: BrowserContext
) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = open_page(address)
    send(page)
    done(page)
    page.get_by_role("button", name="Regenerate").click()
    done(page)
    expect(answers(page)).to_have_count(1)
    page.get_by_role("button", name="Edit").click()
    page.locator(".edit textarea").fill("What is a dictionary?")
    page.locator(".edit").get_by_role("button", name="Send").click()
    done(page)
    expect(page.locator(".message.user > .text")).to_have_text(["What is a dictionary?"])
    text = wanted(address, 24, "What is a dictionary?")
    assert words(answers(page).inner_text()) == words(text)
    page.locator(".message.assistant").get_by_role("button", name="Copy", exact=True).click()
    assert page.evaluate("navigator.clipboard.readText()") == text
    send(page, "And a set?")
    done(page)
    second = wanted(address, 24, "What is a dictionary?", text, "And a set?")
    assert words(answers(page).last.inner_text()) == words(second)

    page.get_by_role("button", name="New chat").first.click()
    expect(page.locator(".message")).to_have_count(0)
    page.reload()
    page.get_by_role("button", name="What is a dictionary?", exact=True).click()
    expect(page.locator(".message")).to_have_count(4)
    page.locator(".chat-list .delete").click()
    page.reload()
    expect(page.locator(".chat-list li")).to_have_count(1)
    expect(page.locator(".message")).to_have_count(0)


MARKDOWN = """# Title <b>x</b>

Some **bold**, *slanted*, `a < b` and [a link](https://example.org/a?b=1) to https://example.net.
[no](javascript:alert(1)) [no](data:text/html,x) <script>alert(1)</script> ![x](x) snake_case_name

- one
  1. inner
- two

> quoted

| a | b |
|---|---|
| 1 | **2** |

```python
print("<i>")
```
<img src=x onerror=alert(1)>
"""


def test_markdown_becomes_elements_and_never_html(open_page: OpenPage, address: Address) -> None:
    page = open_page(address)
    shown = page.evaluate(
        """async (text) => {
            const { show } = await import(new URL("web/markdown.js", document.baseURI));
            const place = document.createElement("div");
            // As a stream does it: by and by. The end must be as if it had come at once.
            for (let end = 0; end <= text.length; end++) show(place, text.slice(0, end));
            const whole = document.createElement("div");
            show(whole, text);
            return { parts: place.innerHTML, whole: whole.innerHTML, text: place.textContent,
                     tags: [...place.querySelectorAll("*")].map((one) => one.localName),
                     links: [...place.querySelectorAll("a")].map((one) => one.href) };
        }""",
        MARKDOWN,
    )
    assert shown["parts"] == shown["whole"]
    assert set(shown["tags"]) == {
        "h3", "p", "strong", "em", "code", "a", "ul", "ol", "li", "blockquote", "div", "table",
        "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "span", "button", "pre",
    }  # fmt: skip
    assert shown["links"] == ["https://example.org/a?b=1", "https://example.net/"]
    for text in ("<script>alert(1)</script>", "<img src=x", 'print("<i>")', "snake_case_name"):
        assert text in shown["text"]


@pytest.mark.parametrize("text", ["*" * 4000, "`" * 4000, "[" * 4000, "> " * 2000, "- " * 2000,
                                  "|" * 4000 + "\n|--|", "_a" * 3000, "#" * 50 + " x"])  # fmt: skip
def test_markdown_that_a_broken_model_writes_ends(
    open_page: OpenPage, address: Address, text: str
) -> None:
    page = open_page(address)
    length = page.evaluate(
        """async (text) => {
            const { show } = await import(new URL("web/markdown.js", document.baseURI));
            const place = document.createElement("div");
            show(place, text);
            return place.textContent.length;
        }""",
        text,
    )
    assert length <= len(text) + 10


def test_the_key_stays_in_its_tab(
    open_page: OpenPage, demo_swarm: LocalSwarm, errors: list[str]
) -> None:
    with gateway(demo_swarm, api_key=("secret",), max_warm_sessions=0) as found:
        page = open_page(found)
        field = page.get_by_label("API key")
        check_accessible(page)
        field.fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_text("This key is not known here.")).to_be_visible()
        field.fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator(".server")).to_have_count(4)
        send(page)
        done(page)
        expect(page.locator(".message.assistant .footer")).to_contain_text("24 tokens")
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        other = open_page(found)
        expect(other.get_by_label("API key")).to_be_visible()
        page.close()
        other.close()
    refused = [error for error in errors if "401" in error]
    assert len(refused) >= 3
    errors[:] = [error for error in errors if "401" not in error]


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(
    open_page: OpenPage, address: Address, color_scheme: str
) -> None:
    page = open_page(address, color_scheme=color_scheme)
    expect(page.locator(".server")).to_have_count(4)
    page.get_by_role("button", name="Settings").click()
    check_accessible(page)
    send(page)
    done(page)
    check_accessible(page)
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    for name in ("Chats", "Swarm", "Chat"):
        page.get_by_role("navigation").get_by_role("button", name=name, exact=True).click()
        check_accessible(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_everything_can_be_reached_by_keyboard(open_page: OpenPage, address: Address) -> None:
    page = open_page(address)
    expect(page.locator(".server")).to_have_count(4)
    seen = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"new-chat", "model", "health", "settings-button", "prompt", "send", "swarm"} <= seen


def test_a_server_is_killed_and_the_answer_ends_as_it_would_have(
    open_page: OpenPage, tmp_path: Path
) -> None:
    with LocalSwarm("demo", []) as swarm:
        swarm.add_servers(
            [
                ("0:3", {"public_name": "alice"}),
                ("3:8", {"public_name": "bob"}),
                ("3:8", {"public_name": "carol"}),
            ]
        )
        with gateway(swarm, max_warm_sessions=0) as found:
            text = wanted(found, 1500, QUESTION)
            page = open_page(found, max_tokens=1500, color_scheme="light")
            send(page)
            # Of this answer: until it has told, the map marks the chain of the one before.
            chips = page.locator(".message.running .chip")
            expect(chips).to_have_count(2)
            used = chips.nth(1).get_attribute("title")
            (lost,) = [one for one in swarm.servers if one.node.peer_id == used]
            swarm.stop_server(lost)
            gone = page.locator(f'.server[data-peer="{used}"][data-state=ready]')
            expect(gone).to_have_count(0, timeout=20_000)
            expect(page.locator("#events .event.warn")).not_to_have_count(0)
            expect(page.get_by_role("button", name="Stop")).to_be_visible()  # it still runs
            check_accessible(page)
            done(page)
            assert words(answers(page).inner_text()) == words(text)
            expect(page.locator(".message.assistant .footer")).to_contain_text("1500 tokens")
            # And when nobody is left for some blocks, the page says which.
            swarm.stop_server(swarm.servers[1])
            expect(page.locator(".missing")).to_contain_text("3–7", timeout=20_000)
            expect(page.locator("#health-text")).to_have_text("blocks missing")
            check_accessible(page)


def test_pictures(open_page: OpenPage, address: Address, tmp_path: Path) -> None:
    """Those of the documentation, which must stay small."""
    folder = Path(os.environ.get("PAGE_PICTURES", tmp_path))
    for scheme in ("light", "dark"):
        page = open_page(address, max_tokens=60, color_scheme=scheme)
        for question in (QUESTION, "What is a generator?"):
            send(page, question)
            done(page)
        expect(page.locator(".server .tag")).not_to_have_count(0)
        page.locator("#prompt").blur()
        page.screenshot(path=folder / f"page_{scheme}.png")
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.get_by_role("navigation").get_by_role("button", name="Swarm").click()
    page.screenshot(path=folder / "page_phone.png")
    for name in ("light", "dark", "phone"):
        assert 10_000 < (folder / f"page_{name}.png").stat().st_size < MAX_PICTURE_BYTES
