"""The server's page in Debian's Chromium, as a person uses it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, Route, expect, sync_playwright

from tests.server_process import CONTEXT, Server, eventually, server_workspace, serving
from tests.workspace import Workspace

KEY = "sk-correct-horse"
MARKUP = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
STOP_AT_40 = """() => {
  window.lengths = [];
  new MutationObserver(() => {
    const length = document.querySelector(".writing .answer")?.textContent.length ?? 0;
    if (length) window.lengths.push(length);
    if (length >= 40) document.getElementById("stop").click();
  }).observe(document.getElementById("turns"), { childList: true, characterData: true, subtree: true });
}"""
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
PATIENCE = 60_000  # milliseconds: the machine may have other work
expect.set_options(timeout=PATIENCE)
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return server_workspace(tmp_path_factory.mktemp("workspace"), "training.seed=1")


@pytest.fixture(scope="module")
def server(workspace: Workspace) -> Iterator[Server]:
    with serving(workspace.folder, "--chat") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("The tests of the page need Chromium: apt-get install chromium", pytrace=False)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def open_page(server: Server, browser: Browser) -> Iterator[Open]:
    """Opens the page in a browser without a past; at the end it has asked no other host, nor complained.

    `complaint` is how all that the browser may complain of ends, however often it does; not `named`: the page will not
    say the model's name. A page of a server that ends before the test does is to be closed before the server ends.
    """
    contexts: list[BrowserContext] = []
    asked: list[str] = []
    unexpected: list[str] = []

    def opened(address: str = server.address, complaint: str = "", named: bool = True, **options: Any) -> Page:
        def complain(text: str) -> None:
            if not complaint or not text.endswith(complaint):
                unexpected.append(text)

        context = browser.new_context(**options)
        contexts.append(context)
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: complain(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complain(str(error)))
        page.goto(address)
        if named:
            expect(page.locator("#model")).to_contain_text("small-run/7")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert asked and all(url.startswith("http://127.0.0.1:") for url in asked), asked
    assert unexpected == []


def write(page: Page, prompt: str, mode: str = "completion", wait: bool = True, **settings: Any) -> dict[str, Any]:
    """Write with the page; the body of the request that it makes."""
    if mode:
        page.locator(f"input[value={mode}]").check(force=True)
    for name, value in settings.items():
        page.fill(f"[name={name}]", str(value))
    page.fill("#prompt", prompt)
    with page.expect_request("**/v1/**") as request:
        page.click("#write")
    if wait:
        finished(page)
    return body_of(request.value)


def finished(page: Page) -> None:
    expect(page.locator("article footer").last).to_be_visible()
    expect(page.locator(".writing")).to_have_count(0)


def body_of(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(request.post_data or "")
    return body


def answer(page: Page) -> str:
    return page.locator(".answer").last.text_content() or ""


class TestCompletion:
    def test_settings_reach_the_request_and_the_text_is_the_servers(self, open_page: Open, server: Server) -> None:
        page = open_page()
        settings: dict[str, Any] = {"max_tokens": 40, "seed": 3, "temperature": 0.9, "top_k": 50, "top_p": 0.8}
        settings |= {"min_p": 0.01, "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5}
        body = write(page, "The quick", **settings, stop="zzz\na\\nb")
        always = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": 5, "truncation": "auto"}
        assert body == {"prompt": "The quick", "stop": ["zzz", "a\nb"], **always, **settings}
        whole = server.post("/v1/completions", {"prompt": "The quick", **settings}).json()["choices"][0]
        assert answer(page) == whole["text"]
        assert "".join(page.locator(".token").all_text_contents()) == whole["text"]
        assert "40 tokens" in (page.locator("article footer").text_content() or "")
        assert page.locator(".prompt").text_content() == "The quick"

    def test_an_empty_field_is_left_to_the_server(self, open_page: Open) -> None:
        page = open_page()
        expect(page.locator("[name=temperature]")).to_have_attribute("placeholder", "0.8")
        assert write(page, "The", max_tokens=3).keys() == {
            "prompt",
            "max_tokens",
            "logprobs",
            "truncation",
            "stream",
            "stream_options",
        }

    def test_a_setting_that_can_not_be_is_not_sent(self, open_page: Open) -> None:
        page = open_page()
        page.fill("[name=temperature]", "7")
        page.fill("#prompt", "The")
        page.press("#prompt", "Enter")
        expect(page.locator("[name=temperature]")).to_be_focused()
        assert page.locator("article").count() == 0 and page.input_value("#prompt") == "The"

    def test_it_streams_and_stop_frees_the_slot(self, open_page: Open, server: Server) -> None:
        page = open_page()
        page.evaluate(STOP_AT_40)
        left = server.metric("quern_disconnects_total")
        write(page, "The quick", wait=False, temperature=1, max_tokens=CONTEXT)
        expect(page.locator("article footer")).to_contain_text("stopped")
        eventually(lambda: server.metric("quern_running_sequences") == 0)
        assert server.metric("quern_disconnects_total") == left + 1
        lengths = page.evaluate("window.lengths")
        assert len(lengths) > 3 and lengths == sorted(lengths), "it came in parts"
        assert 40 <= len(answer(page)) < CONTEXT, "what was written stays"

    def test_probabilities_of_a_token(self, open_page: Open, server: Server) -> None:
        page = open_page()
        settings: dict[str, Any] = {"max_tokens": 8, "seed": 3}
        write(page, "The quick", **settings)
        asked = {"prompt": "The quick", "logprobs": 5, **settings}
        found = server.post("/v1/completions", asked).json()["choices"][0]["logprobs"]
        levels = page.locator(".token").evaluate_all("all => all.map(one => Number(one.dataset.level))")
        bounds = [0.9, 0.65, 0.4, 0.2, 0.07]
        if not any("bytes" in token for token in found["tokens"]):
            assert levels == [sum(math.exp(value) < bound for bound in bounds) for value in found["token_logprobs"]]
        token, box = page.locator(".token").first, page.locator("#likelihood")
        assert box.is_hidden()
        token.hover()
        expect(box.locator(".drawn")).to_contain_text(f"{100 * math.exp(found['token_logprobs'][0]):.1f}")
        shown = [float(share) for share in re.findall(r"([\d.]+) %", box.inner_text())]
        assert shown == sorted(shown, reverse=True) and len(shown) >= 5
        assert max(found["top_logprobs"][0].values()) == pytest.approx(math.log(shown[0] / 100), abs=0.01)
        page.mouse.move(0, 0)
        expect(box).to_be_hidden()

        sure = "one => getComputedStyle(one).backgroundColor"
        unsure = page.locator('.token:not([data-level="0"])').first
        coloured = unsure.evaluate(sure)
        page.uncheck("#colours")
        assert unsure.evaluate(sure) == "rgba(0, 0, 0, 0)" != coloured

    def test_regenerate_go_on_edit_copy_clear(self, open_page: Open) -> None:
        page = open_page(permissions=["clipboard-read", "clipboard-write"])
        write(page, "The quick", max_tokens=5, seed=1)
        first = answer(page)
        page.fill("[name=seed]", "2")
        page.click("text=Regenerate")
        finished(page)
        second = answer(page)
        assert page.locator("article").count() == 1 and second != first
        with page.expect_request("**/v1/completions") as request:
            page.click("text=Continue")
        assert body_of(request.value)["prompt"] == "The quick" + second
        finished(page)
        page.locator("text=Copy").first.click()
        expect(page.locator("text=Copied")).to_be_visible()
        assert page.evaluate("navigator.clipboard.readText()") == "The quick" + second
        page.locator("text=Edit").first.click()
        assert page.locator("article").count() == 1 and page.input_value("#prompt") == "The quick"
        page.click("#clear")
        assert page.locator("article").count() == 0

    def test_continue_goes_on_with_the_newest_part(self, open_page: Open, server: Server, workspace: Workspace) -> None:
        page = open_page()
        settings: dict[str, Any] = {"max_tokens": 40, "temperature": 0}
        write(page, "x" * (CONTEXT - 45), **settings)
        before = "x" * (CONTEXT - 45) + answer(page)
        ids = workspace.tokenizer.encode(before)
        assert CONTEXT - 40 < len(ids)
        expect(page.locator("article footer")).not_to_contain_text("left out")
        page.click("text=Continue")
        expect(page.locator("article")).to_have_count(2)
        finished(page)
        expect(page.locator("article footer").last).to_contain_text("the beginning of the text was left out")
        newest = server.post("/v1/completions", {"prompt": ids[40 - CONTEXT :], **settings}).json()["choices"][0]
        assert page.locator(".prompt").last.text_content() == before and answer(page) == newest["text"] != ""

    def test_a_reload_brings_it_back(self, open_page: Open) -> None:
        page = open_page()
        write(page, "The quick", max_tokens=9, stop="never")
        before = page.locator("article").inner_html()
        page.reload()
        expect(page.locator("#model")).to_contain_text("small-run/7")
        assert page.locator("article").inner_html() == before
        assert (page.input_value("[name=max_tokens]"), page.input_value("[name=stop]")) == ("9", "never")


class TestChat:
    def test_the_conversation_is_sent(self, open_page: Open) -> None:
        page = open_page()
        system = {"role": "system", "content": "Be brief."}
        first = write(page, "Who jumps?", "chat", system="Be brief.", max_tokens=20, seed=3)
        said = answer(page)
        assert said and "".join(page.locator(".token").all_text_contents()) == said
        assert first["messages"] == [system, {"role": "user", "content": "Who jumps?"}]
        assert (first["logprobs"], first["top_logprobs"]) == (True, 5)
        second = write(page, "Why?", "chat")
        assert second["messages"][1:] == [
            {"role": "user", "content": "Who jumps?"},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "Why?"},
        ]
        page.locator("text=Regenerate").first.click()
        finished(page)
        assert page.locator(".prompt").all_text_contents() == ["Who jumps?"], "what came after has gone"

    def test_a_conversation_longer_than_the_context_goes_on(self, open_page: Open, server: Server) -> None:
        page = open_page()
        settings: dict[str, Any] = {"max_tokens": 200, "seed": 3}
        said = [{"role": "system", "content": "Be brief."}]
        for number in range(4):
            prompt = f"{number} " + "x" * 700
            write(page, prompt, "chat", system="Be brief.", **settings)
            assert answer(page)
            said += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer(page)}]
        assert page.locator("article .failure:visible").count() == 0
        notes = page.locator("article footer p").all_text_contents()
        assert [note.endswith("; the beginning of the conversation was left out") for note in notes] == [
            *[False, False],
            *[True, True],
        ]
        body = {"messages": [said[0], *said[5:-1]], **settings}
        alone = server.post("/v1/chat/completions", body).json()
        assert alone["choices"][0]["message"]["content"] == answer(page)
        assert alone["usage"]["completion_tokens"] == int(notes[-1].split()[0]) > 1


class TestWhatIsSaidIsText:
    def test_of_the_person(self, open_page: Open) -> None:
        page = open_page()
        for mode in ("completion", "chat"):
            write(page, MARKUP, mode, max_tokens=2)
            assert page.locator(".prompt").text_content() == MARKUP
            assert (page.locator("#turns img, #turns script").count(), page.title()) == (0, "Quern")

    def test_of_the_model_and_the_server(self, open_page: Open) -> None:
        page = open_page()
        token = {"tokens": [MARKUP], "token_logprobs": [-1.0], "top_logprobs": [{MARKUP: -1.0}], "text_offset": [0]}
        chunks: list[Any] = [{"choices": [{"text": MARKUP, "logprobs": token}]}, {"error": {"message": MARKUP}}]
        events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)

        def fulfil(route: Route) -> None:
            route.fulfill(status=200, content_type="text/event-stream", body=events)

        page.route("**/v1/completions", fulfil)
        write(page, "The")
        page.locator(".token").hover()
        for place in (".answer", "article .failure"):
            assert page.locator(place).text_content() == MARKUP
        expect(page.locator("#likelihood code")).to_have_text(MARKUP.replace(" ", "␣"))
        assert (page.locator("main img, main script, #likelihood img").count(), page.title()) == (0, "Quern")

    def test_the_policy_lets_no_other_code_in(self, open_page: Open, server: Server) -> None:
        page = open_page()
        answer = page.request.get(server.address)
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! [^>]*src=)|https?:", answer.text())


class TestKeyboard:
    def test_lines_sending_and_stopping(self, open_page: Open) -> None:
        page = open_page()
        page.locator("input[value=completion]").check(force=True)
        page.fill("[name=max_tokens]", str(CONTEXT))
        page.fill("[name=temperature]", "1")
        page.focus("#prompt")
        page.keyboard.type("The")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("quick")
        page.keyboard.press("Enter")
        expect(page.locator(".prompt")).to_have_text("The\nquick")
        expect(page.locator(".writing .token").first).to_be_attached()
        page.keyboard.press("Escape")
        expect(page.locator("article footer")).to_contain_text("stopped")

    def test_from_token_to_token(self, open_page: Open) -> None:
        page = open_page()
        write(page, "The quick", max_tokens=6, seed=3)
        page.focus(".answer")
        page.keyboard.press("ArrowRight")
        expect(page.locator(".token").nth(0)).to_be_focused()
        page.keyboard.press("ArrowRight")
        expect(page.locator(".token").nth(1)).to_be_focused()
        expect(page.locator("#likelihood .drawn")).to_be_visible()
        outline = page.locator(".token").nth(1).evaluate("one => getComputedStyle(one).outlineStyle")
        assert outline == "solid"

    def test_every_field_has_a_name(self, open_page: Open) -> None:
        page = open_page()
        fields = page.locator("input, textarea, button").evaluate_all(
            "all => all.filter((one) => !one.labels?.length && !one.ariaLabel && !one.textContent.trim())"
            ".map((one) => one.id)"
        )
        assert fields == []


class TestLooks:
    def test_dark_and_light(self, open_page: Open) -> None:
        background = "() => getComputedStyle(document.body).backgroundColor"
        dark, light = open_page(color_scheme="dark"), open_page(color_scheme="light")
        assert (dark.evaluate(background), light.evaluate(background)) == ("rgb(13, 17, 23)", "rgb(255, 255, 255)")
        dark.click("#theme")
        assert dark.evaluate(background) == "rgb(255, 255, 255)"
        dark.reload()
        assert dark.evaluate(background) == "rgb(255, 255, 255)", "the choice is kept"
        expect(dark.locator("#theme")).to_have_text("Dark")

    def test_on_a_phone(self, open_page: Open) -> None:
        page = open_page(**PHONE)
        page.click("summary")
        page.fill("[name=max_tokens]", "60")
        page.click("summary")
        write(page, "x" * 200)
        page.locator(".token").nth(3).tap()
        box = page.locator("#likelihood")
        expect(box).to_be_visible()
        place = box.bounding_box()
        assert place and place["x"] >= 0 and place["x"] + place["width"] <= 360
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        for name in ("#prompt", "#write", "#clear", "#theme"):
            found = page.locator(name).bounding_box()
            assert found and found["x"] + found["width"] <= 360 and found["y"] + found["height"] <= 640


class TestErrors:
    def test_a_prompt_that_is_too_long(self, open_page: Open) -> None:
        page = open_page(complaint="status of 400 (Bad Request)")
        write(page, "The quick " * CONTEXT, "chat")
        expect(page.locator("article .failure")).to_contain_text("maximum context length is 2,048 tokens")
        page.click("text=Edit")
        assert write(page, "The", "chat", max_tokens=2)["messages"][-1]["content"] == "The", "the page goes on"
        expect(page.locator("article footer")).to_contain_text("2 tokens")

    def test_a_server_that_is_gone(self, open_page: Open) -> None:
        page = open_page(complaint="net::ERR_FAILED")
        page.route("**/v1/completions", lambda route: route.abort())
        write(page, "The")
        expect(page.locator("article .failure")).to_contain_text("The server can't be reached.")

    def test_a_stream_that_breaks_off(self, open_page: Open) -> None:
        page = open_page()
        half = 'data: {"choices": [{"text": "half"}]}\n\n'
        page.route("**/v1/completions", lambda route: route.fulfill(content_type="text/event-stream", body=half))
        write(page, "The")
        assert answer(page) == "half"
        expect(page.locator("article .failure")).to_contain_text("ended before the text was complete")

    @pytest.mark.slow
    def test_a_key_is_asked_for_and_kept_for_the_tab(self, open_page: Open, workspace: Workspace) -> None:
        with serving(workspace.folder, QUERN_API_KEY=KEY) as closed:
            page = open_page(closed.address, complaint="status of 401 (Unauthorized)", named=False)
            expect(page.locator("#trouble")).to_contain_text("API key")
            page.fill("#key-text", "wrong")
            page.press("#key-text", "Enter")
            expect(page.locator("#trouble")).to_have_text("Incorrect API key provided.")
            page.fill("#key-text", KEY)
            page.press("#key-text", "Enter")
            expect(page.locator("#model")).to_contain_text("small-run/7")
            expect(page.locator("#key")).to_be_hidden()
            expect(page.locator("#modes")).to_be_hidden()  # this model has no chat form
            write(page, "The", mode="", max_tokens=3)
            assert len(answer(page)) > 0
            page.reload()
            expect(page.locator("#model")).to_contain_text("small-run/7")
            page.context.close()  # the icon, for one, is loaded whenever the browser likes to
