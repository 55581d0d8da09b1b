"""assets/player.html, filled by test.py, in a real browser: what sounds must be what the buttons say."""

import json
import re
import shutil
import time

import numpy as np
import pytest
import soundfile
import test
from conftest import FOLDER

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="the player's tests need: pip install selenium"
)
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

TEMPLATE = FOLDER / "assets" / "player.html"
RATE, SECONDS = 44100, 30  # not over before a slow machine has pressed all keys
TONES = {"vocals": 440, "drums": 110, "bass": 55, "other": 880}  # Hz
STEMS = list(TONES)
NAMES = ["mixture", *STEMS]
HOSTILE = '</script><img src=x onerror=alert(1)> & "R\u00f8d" \'\u2028<!--<script>'


def tone(frequency):
    seconds = np.arange(RATE * SECONDS) / RATE
    return np.repeat(0.2 * np.sin(2 * np.pi * frequency * seconds)[:, None], 2, axis=1)  # (N, C)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip(
            "the player's tests need chromium and chromedriver: apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-sync window-size=1200,900"
    flags += " disable-background-networking disable-component-update autoplay-policy=no-user-gesture-required"
    for flag in [*flags.split(), f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A page as `test.py --html` writes it, for four tones and their sum."""
    folder = tmp_path_factory.mktemp("player")
    stems = {name: tone(frequency) for name, frequency in TONES.items()}
    for name, audio in {"mixture": sum(stems.values()), **stems}.items():
        soundfile.write(folder / f"{name}.wav", audio, RATE)
    recordings = {name: test.Recording(folder / f"{name}.wav") for name in NAMES}
    test.write_page(HOSTILE, recordings, folder / "index.html")
    return folder / "index.html"


def wait(condition, seconds=30):
    """The first true value of condition(); fades and audio devices take their time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


class Player:
    """The page as a listener has it: buttons, keys and ears."""

    def __init__(self, driver, path):
        self.driver = driver
        driver.get(path.as_uri())
        driver.execute_async_script("player.ready.then(arguments[0])")

    def ask(self, expression):
        return self.driver.execute_script(f"return player.{expression}")

    def actions(self):
        return ActionChains(self.driver, duration=0)

    def press(self, *keys):
        self.actions().send_keys(*keys).perform()

    def button(self, name, kind):
        return self.driver.find_elements(By.CSS_SELECTOR, f".{kind}")[NAMES.index(name)]

    def click(self, name, kind):
        self.button(name, kind).click()

    def pressed(self, kind):
        return [
            name
            for name in NAMES
            if self.button(name, kind).get_attribute("aria-pressed") == "true"
        ]

    def level(self, name):
        return self.ask(f"level({name!r})")

    def heard(self):
        """Names of the stems that sound by their levels, once these are what the gains say: exactly 0, or well above."""

        def agree():
            gains, levels = self.ask("gains()"), [self.level(name) for name in NAMES]
            if all(
                level > 0.01 if gains[name] else level == 0 for name, level in zip(NAMES, levels)
            ):
                return levels

        return [name for name, level in zip(NAMES, wait(agree)) if level]

    def seek(self, fraction, name="mixture"):
        wave = self.driver.find_elements(By.CSS_SELECTOR, ".wave")[NAMES.index(name)]
        offset = round((fraction - 0.5) * wave.size["width"])
        self.actions().move_to_element_with_offset(wave, offset, 0).click().perform()

    def status(self):
        return self.driver.find_element(By.ID, "status").text


@pytest.fixture
def player(browser, path):
    return Player(browser, path)


def test_starts_with_the_stems_and_in_time(player):
    play = player.driver.find_element(By.ID, "play")
    assert not player.ask("playing") and play.get_attribute("aria-label") == "Play"
    assert player.pressed("mute") == ["mixture"] and player.pressed("solo") == []
    assert player.ask("duration") == pytest.approx(SECONDS, abs=0.1)
    assert player.driver.find_element(By.ID, "time").text == "0:00 / 0:30"
    play.click()
    assert player.heard() == STEMS
    assert (
        play.get_attribute("aria-pressed") == "true" and play.get_attribute("aria-label") == "Pause"
    )
    begin, clock = player.ask("currentTime()"), time.monotonic()
    time.sleep(0.5)
    assert player.ask("currentTime()") - begin == pytest.approx(time.monotonic() - clock, abs=0.25)
    play.click()
    assert not player.ask("playing") and play.get_attribute("aria-pressed") == "false"
    stopped = player.ask("currentTime()")
    wait(lambda: not any(player.level(name) for name in NAMES))
    assert player.ask("currentTime()") == stopped > 0.5


def test_mute_solo_and_volume(player):
    player.press(Keys.SPACE)
    player.click("drums", "mute")
    assert player.heard() == ["vocals", "bass", "other"] and player.pressed("mute") == [
        "mixture",
        "drums",
    ]
    player.click("drums", "solo")  # solo wins over mute
    player.click("bass", "solo")
    assert player.heard() == player.pressed("solo") == ["drums", "bass"]
    assert player.status() == "You hear drums + bass."
    player.click("drums", "solo")
    assert player.heard() == ["bass"]
    loud = 0.2 / np.sqrt(2)  # RMS of a sine of amplitude 0.2
    wait(lambda: player.level("bass") == pytest.approx(loud, rel=0.1))
    half = "const slider = document.querySelectorAll('.volume')[3]; slider.value = 0.5; slider.dispatchEvent(new Event('input'))"
    player.driver.execute_script(half)
    wait(lambda: player.level("bass") == pytest.approx(loud / 4, rel=0.1))  # the slider's square
    assert player.heard() == ["bass"] and player.ask("gains()")["bass"] == 0.25
    player.click("bass", "solo")
    assert player.heard() == ["vocals", "bass", "other"]
    for name in ("vocals", "bass", "other"):
        player.click(name, "mute")
    assert player.heard() == [] and player.status() == "Everything is muted."


def test_compare_with_the_mixture(player):
    compare = player.driver.find_element(By.ID, "compare")
    assert (
        compare.text == "Compare with mixture" and player.status() == "You hear all stems together."
    )
    player.press(Keys.SPACE)
    compare.click()
    assert player.heard() == ["mixture"] and compare.get_attribute("aria-pressed") == "true"
    player.press("1")
    assert player.heard() == STEMS and compare.get_attribute("aria-pressed") == "false"


def test_keys(player):
    player.press(Keys.SPACE)
    assert player.ask("playing")
    player.press("2")
    assert player.heard() == player.pressed("solo") == ["vocals"]
    player.press("3")
    assert player.heard() == player.pressed("solo") == ["drums"]
    player.actions().key_down(Keys.SHIFT).send_keys("5").key_up(Keys.SHIFT).perform()
    assert player.heard() == player.pressed("solo") == ["drums", "other"]
    player.press("9")  # no such stem
    assert player.pressed("solo") == ["drums", "other"]
    player.press("0")
    assert player.heard() == STEMS and player.pressed("solo") == []
    player.press(Keys.SPACE)  # time stands still, however slow the browser is
    wait(lambda: not player.ask("playing"))
    player.seek(0.05)
    before = player.ask("currentTime()")
    player.press(Keys.ARROW_RIGHT)
    assert player.ask("currentTime()") == pytest.approx(before + 5, abs=0.01)
    player.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert player.ask("currentTime()") == 0
    player.press(Keys.SPACE)
    player.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert player.ask("volume") == pytest.approx(0.9)
    player.click("drums", "mute")  # a clicked button must not catch the space bar
    player.press(Keys.SPACE)
    assert not player.ask("playing") and player.pressed("mute") == ["mixture", "drums"]
    player.driver.execute_script("arguments[0].focus()", player.button("drums", "mute"))
    player.press(Keys.SPACE)  # one reached by Tab must
    assert not player.ask("playing") and player.pressed("mute") == ["mixture"]


def test_seek_drag_and_end(player):
    player.seek(0.5)
    assert player.ask("currentTime()") == pytest.approx(SECONDS / 2, abs=0.1)
    assert player.driver.find_element(By.ID, "time").text.startswith(("0:14 /", "0:15 /"))
    player.press(Keys.SPACE)
    player.seek(0.75, "bass")
    assert player.ask("playing") and player.ask("currentTime()") == pytest.approx(
        0.75 * SECONDS, abs=2
    )
    assert player.heard() == STEMS
    wave = player.driver.find_element(By.CSS_SELECTOR, ".wave")
    width = wave.size["width"]
    player.actions().move_to_element(wave).click_and_hold().move_by_offset(
        -round(width / 4), 0
    ).release().perform()
    assert player.ask("playing") and player.ask("currentTime()") == pytest.approx(
        SECONDS / 4, abs=2
    )
    player.seek(0.98)
    wait(lambda: not player.ask("playing"))
    assert player.ask("currentTime()") == player.ask("duration")
    player.press(Keys.SPACE)  # plays again from the start
    assert player.ask("playing") and player.ask("currentTime()") < 1


def test_hostile_title_is_text(player):
    assert player.driver.title.startswith("</script><img")
    assert (
        player.driver.execute_script("return document.querySelector('h1').textContent") == HOSTILE
    )
    assert player.driver.find_elements(By.TAG_NAME, "img") == []  # a pending alert would raise here


def test_needs_nothing_but_itself(player):
    assert not re.findall(r"https?:|\bimport\b|@import|url\(", TEMPLATE.read_text(encoding="utf-8"))
    player.driver.get_log("performance"), player.driver.get_log("browser")  # drop what came before
    player.driver.refresh()
    player.driver.execute_async_script("player.ready.then(arguments[0])")
    player.press(Keys.SPACE)
    assert player.heard() == STEMS
    events = [
        json.loads(entry["message"])["message"] for entry in player.driver.get_log("performance")
    ]
    requests = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert requests == [player.driver.current_url]
    assert player.driver.get_log("browser") == []


def test_broken_audio_is_named(browser, path, tmp_path):
    broken = re.sub(
        r'("name": "drums", "audio": "data:audio/mpeg;base64,)[^"]*',
        r"\1AAAA",
        path.read_text(encoding="utf-8"),
    )
    (tmp_path / "broken.html").write_text(broken, encoding="utf-8")
    player = Player(browser, tmp_path / "broken.html")
    assert player.status().startswith("This browser cannot decode “drums”")
    assert player.driver.find_element(By.ID, "play").get_attribute("disabled") == "true"


def test_template_alone_says_what_it_is(browser):
    browser.get(TEMPLATE.as_uri())
    assert "Nothing to play in this file" in browser.find_element(By.TAG_NAME, "main").text
    assert not browser.find_element(By.ID, "player").is_displayed()


# ------------------------------------------------------------------------------ versions side by side

VERSIONS = {"one": 1, "two": 3, "three": 5}  # by which the tones are multiplied


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What `test.py --page` writes of three folders, of which one has no vocals and one more than the others."""
    folder = tmp_path_factory.mktemp("page")
    for version, factor in VERSIONS.items():
        (folder / version / "Song").mkdir(parents=True)
        for name in {"one": ["vocals", "bass", "extra"], "three": ["bass"]}.get(version, STEMS[:3]):
            audio = tone(factor * TONES.get(name, 100))
            soundfile.write(folder / version / "Song" / f"{name}.wav", audio, RATE)
    folders = [str(folder / version / "Song") for version in VERSIONS]
    assert test.main(["--page", *folders, "--outdir", str(folder / "out")]) == 0
    return folder / "out" / "index.html"


class Comparison(Player):
    def buttons(self, selector):
        found = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return {button.text: button for button in found if button.is_displayed()}

    def rows(self):
        found = self.driver.find_elements(By.CSS_SELECTOR, ".stem")
        return [row.find_element(By.TAG_NAME, "b").text for row in found if row.is_displayed()]

    def heard(self):
        """The one stem that sounds, by its level, once this is what the gains say."""

        def alone():
            gains = self.ask("gains()")
            levels = {name: self.level(name) for name in gains}
            [chosen] = [name for name in gains if gains[name]]
            loud = [name for name in levels if levels[name]]
            return chosen if loud == [chosen] and levels[chosen] > 0.1 else None

        return wait(alone)


@pytest.fixture
def comparison(browser, page):
    return Comparison(browser, page)


def test_versions_sound_one_at_a_time(comparison):
    assert comparison.driver.title == "Song"
    assert sorted(comparison.ask("gains()")) == sorted(
        ["one: bass", "two: bass", "three: bass", "one: vocals", "two: vocals"]
    )  # not what one folder alone has
    assert list(comparison.buttons("#groups .toggle")) == ["bass", "vocals"]
    assert comparison.rows() == ["one", "two", "three"]
    assert not comparison.buttons(".mute") and not comparison.buttons("#compare")
    comparison.press(Keys.SPACE)
    assert comparison.heard() == "one: bass" and comparison.status() == "You hear one: bass."
    comparison.press("3")
    assert comparison.heard() == "three: bass"
    before = comparison.ask("currentTime()")
    comparison.buttons(".solo")
    comparison.driver.find_elements(By.CSS_SELECTOR, ".solo")[1].click()
    assert comparison.heard() == "two: bass" and comparison.ask("currentTime()") >= before
    comparison.press("2", "0", "9")  # the same again, and nothing
    assert comparison.heard() == "two: bass"
    comparison.buttons("#groups .toggle")["vocals"].click()  # the same version of another stem
    assert comparison.heard() == "two: vocals" and comparison.rows() == ["one", "two"]
    assert comparison.status() == "You hear two: vocals."
    comparison.press("1")
    assert comparison.heard() == "one: vocals"
    comparison.buttons("#groups .toggle")["bass"].click()
    comparison.press("3")
    comparison.buttons("#groups .toggle")["vocals"].click()  # which "three" does not have
    assert comparison.heard() == "one: vocals"


@pytest.mark.parametrize("honest", [True, False])
def test_blind_test(comparison, honest):
    """A and B are the two versions heard last; X is one of them; who hears it answers all ten rightly."""
    comparison.press(Keys.SPACE, "3", "1")
    [(label, start)] = comparison.buttons("#blind").items()
    assert label == "Blind test: one / three"
    start.click()
    assert comparison.rows() == [] and not comparison.buttons("#groups .toggle")
    asked = comparison.driver.find_element(By.ID, "question")
    order = []
    for trial in range(10):
        assert asked.text.startswith(f"Trial {trial + 1} of 10.")
        heard = {}
        for letter in "ABX":
            if trial % 2:
                comparison.press(letter.lower())
            else:
                comparison.buttons("#trial .hear")[letter].click()
            heard[letter] = comparison.heard()
            assert comparison.status() == f"You hear {letter}."  # and no more
            if comparison.ask("currentTime()") > 9:
                comparison.press(*[Keys.ARROW_LEFT] * 2)
        assert sorted([heard["A"], heard["B"]]) == ["one: bass", "three: bass"]
        order.append(heard["X"])
        right = "A" if heard["X"] == heard["A"] else "B"
        answer = right if honest else "AB".replace(right, "")
        comparison.buttons("#trial .answer")[f"X is {answer}"].click()
    names = [heard[letter].partition(":")[0] for letter in "AB"]
    said = "10 of 10 right. By guessing alone, so many or more come about in 0.098 % of tests."
    if not honest:
        said = "0 of 10 right. By guessing alone, so many or more come about in 100 % of tests."
    assert asked.text == f"{said} A was {names[0]}, B was {names[1]}."
    assert not any(b.is_enabled() for b in comparison.buttons("#trial .answer").values())
    comparison.buttons("#leave")["Back"].click()
    assert comparison.rows() == ["one", "two", "three"] and comparison.heard() == "one: bass"


def test_blind_test_can_be_given_up_and_draws_anew(comparison):
    orders, drawn = set(), set()
    for _ in range(12):
        comparison.buttons("#blind")["Blind test: one / two"].click()
        gains = comparison.ask("gains()")
        orders.add(max(gains, key=gains.get))  # A
        comparison.press("x")
        gains = comparison.ask("gains()")
        drawn.add(max(gains, key=gains.get))
        comparison.buttons("#leave")["Give up"].click()
    assert orders == drawn == {"one: bass", "two: bass"}  # each missing once in 2000 times
