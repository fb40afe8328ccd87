"""The playground in a real browser, on the real engine: clicked, typed in, read."""

import re

import pytest

from tests.serve.browser import CHROMIUM, Browser
from tests.serve.served import until

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the playground was not tried in a browser"),
]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium") / "profile")
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium, server):
    chromium.problems.clear()
    chromium.asked.clear()
    chromium.resize(1280, 900)
    chromium.open(server.address)
    chromium.until("!document.querySelector('#generate').disabled")
    return chromium


def choose(browser, *variants):
    for name in browser.run("[...document.querySelectorAll('input[name=variant]')].map((box) => box.value)"):
        if browser.run(f"document.querySelector('input[value={name}]').checked") != (name in variants):
            browser.click(f"input[value={name}]")


def finished(browser):
    browser.until("document.querySelector('#stop').hidden && document.querySelectorAll('.card').length > 0")


def captions(browser) -> dict[str, str]:
    return dict(
        browser.run(
            "[...document.querySelectorAll('.run:first-child .card')]"
            ".map((c) => [c.querySelector('.name').textContent, c.innerText])"
        )
    )


def test_the_form_starts_as_the_pipeline_is_called_and_shows_every_variant(browser, engine):
    assert browser.run("['steps', 'width', 'height', 'seed'].map((id) => document.getElementById(id).value)") == [
        "2",
        "32",
        "32",
        "0",
    ]
    shown = browser.text("#variants")
    for name, variant in engine.weights.variants.items():
        assert name in shown and f"({round(variant.share * 100)} %) · {variant.blocks} blocks" in shown
    assert browser.run("document.querySelector('#key-field').hidden") is True
    assert browser.run("document.querySelector('[data-argument=negative_prompt]').hidden") is False


def test_variants_are_drawn_side_by_side_with_their_parameters_and_seconds(browser):
    browser.type("#prompt", "a red circle")
    browser.type("#seed", "7")
    browser.type("#steps", "5")
    choose(browser, "teacher", "p75", "auto")
    browser.click("#generate")
    finished(browser)
    told = captions(browser)
    assert set(told) == {"auto: teacher", "teacher", "p75"}
    for text in told.values():
        assert re.search(
            r"\d+ k parameters, \d blocks\n[\d.]+ (ms|s), of which [\d.]+ (ms|s) for 5 steps\nseed 7", text
        ), text
    assert browser.text(".run:first-child h2") == "a red circle"
    assert (
        browser.run(
            "[...document.querySelectorAll('.run:first-child img')].every((i) => i.naturalWidth === 32 && i.alt)"
        )
        is True
    )
    assert len(set(browser.run("[...document.querySelectorAll('.run:first-child img')].map((i) => i.src)"))) == 2
    assert browser.text("#live").endswith("s.")
    assert browser.problems == []


def test_the_same_seed_and_variant_give_the_same_picture_again(browser):
    browser.type("#prompt", "a blue square")
    choose(browser, "p90")
    for _ in range(2):
        browser.click("#generate")
        finished(browser)
    assert len(set(browser.run("[...document.querySelectorAll('.card img')].map((i) => i.src)"))) == 1
    browser.click("#new-seed")
    browser.click("#generate")
    finished(browser)
    assert len(set(browser.run("[...document.querySelectorAll('.card img')].map((i) => i.src)"))) == 2


def test_previews_appear_while_a_picture_is_drawn_and_it_can_be_stopped(browser, server):
    from tests.serve.api.test_client import waiting

    browser.type("#prompt", "a red circle")
    browser.type("#steps", "1600")
    choose(browser, "all")
    browser.click("#generate")
    browser.until("!document.querySelector('.card img').hidden && !document.querySelector('.card.ended')")
    assert re.search(r"step \d+ of 1600", captions(browser)["all"])
    assert 0 < browser.run("document.querySelector('.card progress').value") < 1
    browser.click("#stop")
    finished(browser)
    assert "Stopped." in captions(browser)["all"]
    until(lambda: not waiting(server), "the work did not end")


def test_it_works_by_keyboard_alone(browser):
    browser.run("document.querySelector('#prompt').focus()")
    browser.insert("a green triangle")
    reached = []
    for _ in range(30):
        browser.press("Tab")
        reached.append(browser.run("document.activeElement.id || document.activeElement.value"))
        if reached[-1] == "p75":
            browser.press(" ")
        if reached[-1] == "generate":
            break
    assert {
        "negative_prompt",
        "seed",
        "new-seed",
        "steps",
        "width",
        "height",
        "auto",
        "teacher",
        "p75",
        "generate",
    } <= set(reached)
    outline = browser.run(
        "getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).outlineWidth"
    )
    assert outline == "solid3px"
    browser.press("Enter")
    finished(browser)
    assert "p75" in captions(browser)


def test_a_link_brings_the_settings_back_and_the_server_never_sees_them(browser, server):
    browser.type("#prompt", "ein Kreis & ein #Quadrat")
    browser.type("#negative_prompt", "blurry")
    browser.type("#seed", "12")
    browser.type("#steps", "3")
    browser.type("#width", "48")
    choose(browser, "p90", "all")
    browser.click("#share")
    browser.until(
        "document.querySelector('#share').textContent === 'Copied' || !document.querySelector('#link-field').hidden"
    )
    link = browser.run("location.href")
    assert link.startswith(f"{server.address}/#prompt=")
    browser.asked.clear()
    browser.open(link)
    browser.until("!document.querySelector('#generate').disabled")
    fields = ("prompt", "negative_prompt", "seed", "steps", "width", "height")
    told = browser.run(f"{list(fields)}.map((id) => document.getElementById(id).value)")
    assert told == ["ein Kreis & ein #Quadrat", "blurry", "12", "3", "48", "32"]
    assert browser.run("[...document.querySelectorAll('input[name=variant]:checked')].map((box) => box.value)") == [
        "p90",
        "all",
    ]
    assert not [address for address in browser.asked if "Quadrat" in address.partition("#")[0]]


@pytest.mark.parametrize(
    ("fields", "said", "focused"),
    [
        ({"#prompt": " "}, "Describe the image.", "prompt"),
        ({"#prompt": "a", "#width": "33"}, "Width is a multiple of 8.", "width"),
        ({"#prompt": "a", "#steps": "99999"}, "Steps is at most 2000.", "steps"),
        ({"#prompt": "a", "#seed": "-1"}, "Seed is at least 0.", "seed"),
    ],
)
def test_what_is_wrong_in_the_form_is_told_where_it_is_before_anything_is_asked(browser, fields, said, focused):
    for selector, text in fields.items():
        browser.type(selector, text)
    browser.asked.clear()
    browser.click("#generate")
    where = browser.run(f"[...document.querySelectorAll('.problem')].find((one) => one.innerText === '{said}').id")
    assert browser.run("document.activeElement.id") == focused
    # Where the focus is, in sight and below it.
    below = (
        f"document.getElementById('{where}').getBoundingClientRect().bottom"
        f" - document.getElementById('{focused}').getBoundingClientRect().top"
    )
    assert 0 < browser.run(below) < 250
    assert browser.run(f"document.getElementById('{focused}').getAttribute('aria-invalid')") == "true"
    assert browser.asked == []


def test_without_a_variant_nothing_is_asked(browser):
    browser.type("#prompt", "a")
    choose(browser)
    browser.click("#generate")
    assert "Choose at least one variant." in browser.text("#form")


def test_what_the_server_refuses_is_told_in_its_words_beside_what_it_drew(browser):
    browser.type("#prompt", "a")
    browser.type("#steps", "2000")
    choose(browser, "auto")
    browser.type("#deadline", "0.001")
    browser.click("#generate")
    finished(browser)
    (told,) = captions(browser).values()
    assert "No image" in told and "deadline_ms is 1" in told


def test_nothing_comes_from_elsewhere_and_parts_are_cached_by_their_hash(browser, server):
    assert {address.split("/")[2] for address in browser.asked if not address.startswith("data:")} == {
        f"127.0.0.1:{server.port}"
    }
    parts = [address.removeprefix(server.address) for address in browser.asked if "/page/" in address]
    assert len(parts) == 2 and all(re.fullmatch(r"/page/page\.[0-9a-f]{16}\.(css|js)", part) for part in parts)
    for part in parts:
        assert "immutable" in server.ask("GET", part).headers["cache-control"]
    page = server.ask("GET", "/")
    again = server.ask("GET", "/", headers={"if-none-match": page.headers["etag"]})
    assert (again.status, again.body) == (304, b"")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy
    assert browser.problems == []


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_every_field_has_a_name(browser, dark):
    browser.resize(360, 740, phone=True, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") == 360
    small = (
        "[...document.querySelectorAll('button, label.variant, input:not([type=checkbox])')]"
        ".filter((e) => e.offsetParent && e.offsetHeight < 44)"
    )
    assert browser.run(f"{small}.map((e) => e.id || e.textContent)") == []
    nameless = (
        "[...document.querySelectorAll('input, textarea, button')]"
        ".filter((e) => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()))"
    )
    assert browser.run(f"{nameless}.map((e) => e.id)") == []
    assert browser.run("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 22, 26)" if dark else "rgb(252, 251, 248)"
    )


def test_a_server_with_keys_is_asked_with_the_key_that_was_typed_which_stays_in_the_tab(chromium, locked_server):
    chromium.open(locked_server.address)
    chromium.until("document.querySelector('#variants').innerText.includes('Enter an API key')")
    assert chromium.run("document.activeElement.id") == "key"
    chromium.type("#key", "wrong")
    chromium.press("Enter")
    chromium.until("!document.querySelector('#problem').hidden")
    assert chromium.text("#problem").startswith("This API key is not known here")
    chromium.type("#key", "sesame")
    chromium.click("#use-key")
    chromium.until("!document.querySelector('#generate').disabled")
    chromium.type("#prompt", "a red circle")
    chromium.click("#generate")
    finished(chromium)
    assert set(captions(chromium)) == {"teacher", "all"}
    assert chromium.run("[localStorage.length, document.cookie, location.href.includes('sesame')]") == [0, "", False]
