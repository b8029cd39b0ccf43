"""The demo as it is used: headless Chromium on a run's page, by keyboard, mouse and touch."""

import io
import json
import shutil
import time
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra `play` is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright, of the extra `dev`, is not installed")
BROWSER = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None)
if BROWSER is None:
    pytest.skip("no Chromium is installed (Debian and Ubuntu: apt install chromium)", allow_module_level=True)

from playwright.sync_api import expect  # noqa: E402

from dreamer4_jax import cli  # noqa: E402
from dreamer4_jax.play import command  # noqa: E402
from tests.play_serving import serving, tiny_run  # noqa: E402

pytestmark = pytest.mark.browser
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
expect.set_options(timeout=30_000)  # milliseconds; this machine may be busy


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    run = cli._reopen(str(tiny_run(tmp_path_factory.mktemp("runs") / "tiny")))
    with serving(command.make_engine(run, slots=3)) as (port, engine):
        yield f"http://127.0.0.1:{port}/", engine


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield chromium
        chromium.close()


class Player:
    """One page, with whatever went wrong in it. Its clock stands still, so no press is long unless the test says so."""

    def __init__(self, browser, url, prepare=lambda page: None, **options):
        self.context = browser.new_context(**{"viewport": DESKTOP, "accept_downloads": True, **options})
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("request", lambda r: None if r.url.startswith((url, "blob:")) else self.wrong.append(r.url))
        prepare(self.page)
        self.page.clock.install(time=0)
        self.page.clock.pause_at(1000)
        self.page.goto(url)
        expect(self.note).to_contain_text("frame 0")

    @property
    def note(self):
        return self.page.locator("#dream-note")

    def age(self) -> int:
        return int(self.note.text_content().split()[1])

    def reach(self, age: int) -> None:
        """Waits until the dream is that old; `expect` looks too seldom to see a certain frame pass."""
        deadline = time.monotonic() + 30
        while self.age() < age:
            assert time.monotonic() < deadline, f"frame {age} did not come"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def picture(self, canvas: str) -> str:
        return self.page.evaluate("id => document.getElementById(id).toDataURL()", canvas)


@pytest.fixture
def player(served, browser):
    player = Player(browser, served[0])
    yield player
    player.context.close()
    assert not player.wrong


def test_playing_by_keyboard(player):
    before = player.picture("dream"), player.picture("real")
    player.press("ArrowRight")
    expect(player.note).to_have_text("frame 1 · you: turn right")
    assert player.picture("dream") != before[0] and player.picture("real") != before[1]
    player.press("KeyA", "KeyW")
    expect(player.note).to_have_text("frame 3 · you: forward")
    expect(player.page.locator("#latency")).to_contain_text("ms")
    player.press("Backspace")
    expect(player.note).to_have_text("frame 2 · back at: turn left")
    player.press("KeyR")
    expect(player.note).to_have_text("frame 0")
    assert player.picture("real") == before[1]


def test_a_key_that_is_held_goes_on_and_space_runs_and_pauses(player):
    player.page.keyboard.down("ArrowUp")
    player.page.clock.run_for(249)
    time.sleep(0.5)
    assert player.age() == 1
    player.page.clock.run_for(1)
    player.reach(4)
    player.page.keyboard.up("ArrowUp")
    player.press("Space")
    expect(player.page.locator("#run")).to_have_attribute("aria-pressed", "true")
    player.reach(player.age() + 3)
    expect(player.note).to_contain_text("you: wait")
    player.press("Space")
    expect(player.page.locator("#run")).to_have_attribute("aria-pressed", "false")
    age = player.age()
    player.press("Period")
    expect(player.note).to_have_text(f"frame {age + 1} · you: wait")


def test_the_sliders_change_k_and_the_rate_live(player):
    assert player.page.locator("#k-ticks").inner_text().split() == ["1", "2", "4", "8", "auto"]
    k = player.page.locator("#k")
    k.focus()
    player.press("ArrowRight")  # moves the slider, and plays nothing
    expect(player.page.locator("#k-out")).to_have_text("8")
    assert player.age() == 0
    player.page.locator("#mission").click()
    k.evaluate("e => e.blur()")
    player.press("BracketRight")
    expect(player.page.locator("#k-out")).to_have_text("adaptive")
    player.press("BracketLeft", "BracketLeft", "BracketLeft")
    expect(player.page.locator("#k-out")).to_have_text("2")
    player.page.locator("#fps").fill("20")
    expect(player.page.locator("#fps-out")).to_have_text("20")
    player.page.locator("#fps").evaluate("e => e.blur()")
    player.press("ArrowUp")
    expect(player.page.locator("#ms")).to_contain_text("ms")
    assert player.age() == 1


def test_what_the_server_said_before_it_heard_of_a_slider_does_not_undo_it(served, browser):
    """Words of the server that are late, as on a slow line: the presses meanwhile count from what the page shows."""
    late, sockets = [], []

    def hold_back(page):
        def opened(socket):
            server = socket.connect_to_server()
            socket.on_message(server.send)
            state = lambda m: isinstance(m, str) and json.loads(m)["t"] == "state"
            server.on_message(lambda m: late.append(m) if state(m) else socket.send(m))
            sockets.append(socket)

        page.route_web_socket("**/play", opened)

    player = Player(browser, served[0], prepare=hold_back)
    shows = expect(player.page.locator("#k-out"))
    player.press("BracketRight", "BracketLeft", "BracketLeft")  # 8, 4, 2
    deadline = time.monotonic() + 30
    while not late or json.loads(late[-1])["k"] != 2:
        assert time.monotonic() < deadline, f"the server never said 2: {late}"
        player.page.wait_for_timeout(20)
    old = json.loads(late[-1]) | {"k": 8}
    sockets[0].send(json.dumps(old))
    player.page.wait_for_timeout(100)
    shows.to_have_text("2")
    player.press("BracketLeft")
    shows.to_have_text("1")
    sockets[0].send(json.dumps(old | {"k": 1}))  # heard: from now on the server's word counts again
    sockets[0].send(json.dumps(old | {"k": 4}))
    shows.to_have_text("4")
    player.context.close()
    assert not player.wrong


def test_the_policy_takes_over_and_a_key_takes_the_controls_back(player):
    player.press("KeyP")
    expect(player.page.locator("#pilot")).to_have_text("Take overP")
    expect(player.note).to_contain_text("the policy:")
    expect(player.page.locator("#plan li")).to_have_count(3)
    shares = player.page.locator("#pad .share").all_inner_texts()
    assert len(shares) == 7 and 95 <= sum(int(s.split()[0]) for s in shares) <= 105
    player.press("ArrowLeft")
    expect(player.page.locator("#pilot")).to_have_attribute("aria-pressed", "false")


def test_recording_downloads_a_film(player):
    av = pytest.importorskip("av")
    player.press("KeyM")
    expect(player.page.locator("#record")).to_have_attribute("aria-pressed", "true")
    for age, key in enumerate(("ArrowUp", "ArrowLeft", "ArrowRight"), 1):
        player.press(key)
        expect(player.note).to_contain_text(f"frame {age}")
    with player.page.expect_download(timeout=60_000) as download:
        player.press("KeyM")
    with av.open(io.BytesIO(Path(download.value.path()).read_bytes())) as film:
        assert len(list(film.decode(video=0))) == 4  # the one that was shown, and three
    assert download.value.suggested_filename.endswith(".mp4")


def test_starts_are_chosen_by_number(player):
    page = player.page
    player.press("KeyN")
    expect(page.locator("#starts")).to_be_visible()
    page.locator("#level").select_option("1")
    page.locator("#seed").fill("123")
    page.locator("#begin-fresh").click()
    expect(page.locator("#origin")).to_have_text("BabyAI-GoToLocal-v0, seed 123")
    player.press("KeyN")
    options = page.locator("#episode option").all_inner_texts()
    number = max(range(len(options)), key=lambda i: int(options[i].split(" frames")[0].split()[-1]))
    page.locator("#episode").select_option(str(number))
    page.locator("#frame").fill("2")
    expect(page.locator("#frame-out")).to_have_text("2")
    page.locator("#begin-recorded").click()
    expect(page.locator("#origin")).to_have_text(f"recorded episode {number}, frame 2")
    expect(page.locator("#real-absent")).to_be_hidden()  # restored from its seed
    player.press("KeyN", "Escape")
    expect(page.locator("#starts")).to_be_hidden()


def test_uncertainty_and_drift_are_shown_for_every_frame(player):
    player.press("ArrowUp", "ArrowUp")
    expect(player.note).to_contain_text("frame 2")
    for name in ("drift", "seeds", "residual"):
        expect(player.page.locator(f"#{name}-out")).to_contain_text("%")
    blank = player.picture("dream-marks")
    player.page.locator("#mark-wrong").uncheck()
    assert player.picture("dream-marks") != blank  # the untrained dream is wrong somewhere
    player.page.locator("#doubt").uncheck()
    player.page.locator("#doubt").evaluate("e => e.blur()")
    player.press("ArrowUp")
    expect(player.page.locator("#seeds-out")).to_have_text("not measured")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_fits_and_is_drawn_in_its_colours(served, browser, tmp_path, size, scheme):
    touch = size is PHONE
    player = Player(browser, served[0], viewport=size, color_scheme=scheme, has_touch=touch, is_mobile=touch)
    try:
        page = player.page
        forward = page.locator("#pad button", has_text="forward")
        forward.tap() if touch else forward.click()
        expect(player.note).to_contain_text("frame 1 · you: forward")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(","))) > 600) == (scheme == "light")
        for name in ("run", "step", "rewind", "reset", "pilot", "record", "new"):
            box = page.locator(f"#{name}").bounding_box()
            assert box["height"] >= (40 if touch else 28), name
            assert box["x"] >= 0 and box["x"] + box["width"] <= size["width"], name
        shot = tmp_path / f"{scheme}.png"
        page.screenshot(path=shot, full_page=True)
        assert shot.stat().st_size > 20_000
    finally:
        player.context.close()
    assert not player.wrong


def test_everything_is_reached_by_the_tab_key_and_shows_its_focus(player):
    seen = set()
    for _ in range(40):
        player.press("Tab")
        seen.add(player.page.evaluate("document.activeElement.id || document.activeElement.innerText"))
        element = "document.activeElement"
        assert player.page.evaluate(
            f"{element} === document.body || getComputedStyle({element}).outlineStyle !== 'none'"
        )
    assert {"run", "step", "reset", "pilot", "record", "new", "k", "fps", "mark-wrong", "doubt"} <= seen
    assert any("forward" in s for s in seen)


def test_a_lost_server_is_told_and_people_wait_their_turn(served, browser):
    url, engine = served
    players = [Player(browser, url) for _ in range(3)]
    waits = browser.new_page()
    waits.goto(url)
    expect(waits.locator("#connection")).to_contain_text("number 1 in the queue")
    players[0].context.close()
    expect(waits.locator("#dream-note")).to_contain_text("frame 0")
    session = next(iter(engine._sessions.values()))
    for other in players[1:]:
        other.context.close()
    waits.close()
    until = time.monotonic() + 30
    while engine.admitted and time.monotonic() < until:
        time.sleep(0.05)
    assert engine.admitted == 0 and session.over
