"""The page in a real browser, on a desk and on a phone: drawn, filtered, sorted, selected, running nothing foreign."""

import json
import shutil

import pytest
from samples import PICTURE, SVG

SIZES = [(1280, 900), (390, 844)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip install 'lit-distill[dev]')")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in f"{flags} disable-component-update disable-sync disable-dev-shm-usage".split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield session
    session.quit()


@pytest.fixture
def opened(browser, quick, page):
    """Opens the page at a size; afterwards nothing may have been complained of or fetched."""

    def open_at(width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(page().as_uri())
        return browser

    browser.get_log("browser"), browser.get_log("performance")  # forget what earlier tests did
    yield open_at
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    urls = [r["request"]["url"] for r in requests if r["documentURL"].startswith("file:")]  # not chromium's own pages
    assert urls
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("size", SIZES, ids=["desktop", "phone"])
def test_the_page_fits_and_every_plot_is_drawn(opened, size):
    browser = opened(*size)
    assert fits(browser)
    assert browser.execute_script("return window.innerWidth") == size[0]
    ids = browser.execute_script("return [...document.querySelectorAll('.plot')].map(plot => plot.id)")
    assert ids.pop() == "selected-curves"  # drawn when something is selected
    assert len(ids) == 4 + 3  # four figures, and a reliability diagram for each row that has one
    for name in ids:
        drawn = f"document.getElementById('{name}').querySelector('svg.main-svg').getBoundingClientRect()"
        assert 0 < browser.execute_script(f"return {drawn}.width") <= size[0]
    labels = browser.execute_script("return [...document.querySelectorAll('.plot')].map(p => p.ariaLabel)")
    assert all(labels)


def fits(browser):
    root = "document.documentElement"
    return browser.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")


def shown(browser, table):
    """The first words of the visible rows of a table, in their order."""
    script = "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].filter(row => !row.hidden)"
    names = browser.execute_script(f"{script}.map(row => row.cells[0].textContent.trim())", f"table.{table}")
    return [name.split()[0] for name in names]


def find(browser, selector):
    from selenium.webdriver.common.by import By

    return browser.find_element(By.CSS_SELECTOR, selector)


def pick(browser, name):
    from selenium.webdriver.common.keys import Keys

    find(browser, f"input.pick[aria-label='Select {name}']").send_keys(Keys.SPACE)


@pytest.mark.parametrize("size", SIZES, ids=["desktop", "phone"])
def test_details_open_and_close_by_keyboard(opened, size):
    from selenium.webdriver.common.keys import Keys

    browser = opened(*size)
    summary = find(browser, "details > summary")
    table = find(browser, "details table")
    assert not table.is_displayed()
    summary.send_keys(Keys.ENTER)
    assert table.is_displayed()
    summary.send_keys(Keys.SPACE)
    assert not table.is_displayed()


@pytest.mark.parametrize("size", SIZES, ids=["desktop", "phone"])
def test_words_filter_rows_runs_and_figures(opened, size):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    browser = opened(*size)
    box = find(browser, "#filter")
    box.send_keys("quick kd-s3")
    assert shown(browser, "runs") == ["kd-s3"]
    assert shown(browser, "results") == ["kd"]
    assert find(browser, "#shown").text == "1 of 4 rows, 1 of 18 runs"
    drawn = "return document.getElementById('dots').data.map(trace => trace.meta)"
    WebDriverWait(browser, 10).until(lambda page: set(page.execute_script(drawn)) == {"kd"})
    assert fits(browser)
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("no such thing")
    assert (shown(browser, "runs"), shown(browser, "results")) == ([], [])
    find(browser, ".filter button[type=reset]").send_keys(Keys.ENTER)
    WebDriverWait(browser, 10).until(lambda page: len(shown(page, "runs")) == 18)
    assert len(shown(browser, "results")) == 4


def test_of_very_many_rows_the_first_are_shown_until_all_are_asked_for(opened, write_run):
    from selenium.webdriver.common.keys import Keys

    for number in range(250):
        write_run("many", number, name=f"many-{number:03d}")
    browser = opened(*SIZES[1])
    runs = shown(browser, "runs")
    assert (len(runs), runs[-1]) == (100, "many-082")  # after 17 others
    more = next(button for button in browser.find_elements("css selector", ".every") if button.is_displayed())
    assert more.text == "Show all 268 rows"
    find(browser, "#filter").send_keys("many-24")  # beyond those that are shown
    assert shown(browser, "runs") == [f"many-24{digit}" for digit in range(10)]
    assert not more.is_displayed()
    find(browser, "#filter").send_keys(Keys.BACKSPACE * 7)
    more.send_keys(Keys.ENTER)
    assert len(shown(browser, "runs")) == 268
    assert not more.is_displayed()


def test_facets_filter_by_status_and_stage(opened):
    from selenium.webdriver.support.select import Select

    browser = opened(*SIZES[0])
    names = browser.execute_script(
        "return [...document.querySelectorAll('[data-facet]')].map(s => s.parentNode.textContent)"
    )
    assert [name.split()[0] for name in names] == ["stage", "status"]  # the others are the same for all runs
    status = Select(find(browser, "select[data-facet='1']"))
    assert [option.text for option in status.options] == ["all", "broken", "finished", "unfinished"]
    status.select_by_visible_text("unfinished")
    assert (shown(browser, "runs"), shown(browser, "results")) == (["at-s0"], [])
    status.select_by_visible_text("finished")
    Select(find(browser, "select[data-facet='0']")).select_by_visible_text("teacher")
    assert (shown(browser, "runs"), shown(browser, "results")) == (["teacher-s0"], ["teacher"])


def test_any_column_sorts_by_keyboard_and_says_so(opened):
    from selenium.webdriver.common.keys import Keys

    browser = opened(*SIZES[0])
    assert shown(browser, "results") == ["teacher", "baseline", "kd", "fitnets"]
    heads = browser.execute_script("return [...document.querySelectorAll('.results .sort')].map(b => b.textContent)")
    accuracy = browser.execute_script(
        "return document.querySelectorAll('.results .sort')[arguments[0]]", heads.index("test accuracy %")
    )
    state = "return arguments[0].closest('th').getAttribute('aria-sort')"
    assert browser.execute_script(state, accuracy) == "none"
    accuracy.send_keys(Keys.ENTER)
    order = shown(browser, "results")
    assert order[-2:] == ["kd", "teacher"]
    assert browser.execute_script(state, accuracy) == "ascending"
    accuracy.send_keys(Keys.ENTER)
    assert shown(browser, "results")[:2] == ["teacher", "kd"]
    assert browser.execute_script(state, accuracy) == "descending"
    find(browser, ".results .sort").send_keys(Keys.SPACE)
    assert shown(browser, "results") == ["baseline", "fitnets", "kd", "teacher"]
    assert browser.execute_script(state, accuracy) == "none"


def heading(browser, start):
    """The button in the heading of a column of results."""
    script = "return [...document.querySelectorAll('.results .sort')].find(b => b.textContent.startsWith(arguments[0]))"
    return browser.execute_script(script, start)


def test_rows_without_a_value_sort_last_both_ways(opened):
    from selenium.webdriver.common.keys import Keys

    browser = opened(*SIZES[0])
    button = browser.execute_script(
        "return [...document.querySelectorAll('.results .sort')].find(b => b.textContent.startsWith('difference'))"
    )
    for _ in range(2):
        button.send_keys(Keys.ENTER)
        assert set(shown(browser, "results")[2:]) == {"teacher", "baseline"}


@pytest.mark.parametrize("size", SIZES, ids=["desktop", "phone"])
def test_selected_runs_have_curves_and_a_list(opened, size):
    from selenium.webdriver.common.keys import Keys

    browser = opened(*size)
    assert not find(browser, "#selected").is_displayed()
    pick(browser, "kd-s1")
    pick(browser, "teacher")  # the row, and so its one run
    traces = browser.execute_script(
        "return document.getElementById('selected-curves').data.map(t => [t.name, t.x, t.y])"
    )
    assert traces == [
        ["kd-s1", [25, 50, 75, 100], pytest.approx([52.4, 72.4, 79.07, 82.4], abs=0.01)],
        ["teacher-s0", [25, 50, 75, 100], pytest.approx([58.0, 78.0, 84.67, 88.0])],
    ]
    assert find(browser, "#tray-count").text == "2 runs selected"
    assert fits(browser)
    box = "return document.querySelector(`input.pick[aria-label='Select ${arguments[0]}']`)"
    assert browser.execute_script(f"{box}.indeterminate", "kd")  # one of its five runs
    pick(browser, "kd")
    assert find(browser, "#tray-count").text == "6 runs selected"
    find(browser, ".chosen button[aria-label='Remove teacher-s0']").send_keys(Keys.ENTER)
    assert not browser.execute_script(f"{box}.checked", "teacher")
    find(browser, "#clear").send_keys(Keys.ENTER)
    assert not find(browser, "#selected").is_displayed()
    assert not find(browser, ".tray").is_displayed()


def diff(browser):
    script = (
        "return [...document.querySelectorAll('#diff tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    )
    return browser.execute_script(script)


def test_configurations_are_laid_side_by_side(opened, write_run):
    from selenium.webdriver.common.keys import Keys

    write_run("dkd", 0, lr=0.5, method="lit_distill.image.DKD")
    browser = opened(*SIZES[0])
    pick(browser, "kd-s0")
    alone = diff(browser)
    assert alone[0] == ["setting", "kd-s0"]
    assert ["model.init_args.lr", "0.1"] in alone
    assert ["trainer.logger[0].init_args.save_dir", "runs"] in alone
    pick(browser, "dkd-s0")
    assert diff(browser) == [
        ["setting", "kd-s0", "dkd-s0"],
        ["run.name", "kd-s0", "dkd-s0"],
        ["trainer.default_root_dir", "runs/quick/kd-s0", "runs/quick/dkd-s0"],
        ["trainer.logger[0].init_args.version", "kd-s0", "dkd-s0"],
        ["model.class_path", "lit_distill.image.KD", "lit_distill.image.DKD"],
        ["model.init_args.lr", "0.1", "0.5"],
    ]
    assert find(browser, "#diff-summary").text == "5 of 17 settings differ"
    find(browser, "#every-setting").send_keys(Keys.SPACE)
    assert len(diff(browser)) == 1 + 17
    pick(browser, "kd-s1")
    seeds = next(row for row in diff(browser) if row[0] == "seed_everything")
    assert seeds == ["seed_everything", "0", "0", "1"]


ODD = """seed_everything: {seed}
trainer:
  callbacks:
  - class_path: a.First
    init_args:
      betas:
      - 0.9
      - {lr}
  - class_path: b.Second
  max_steps: 5
  text: a long text
    that goes on
"""


def test_lists_and_long_texts_have_paths_of_their_own(opened, write_run):
    write_run("odd", 0, config=ODD, lr=0.5)
    browser = opened(*SIZES[0])
    pick(browser, "odd-s0")
    assert diff(browser)[1:] == [
        ["seed_everything", "0"],
        ["trainer.callbacks[0].class_path", "a.First"],
        ["trainer.callbacks[0].init_args.betas[0]", "0.9"],
        ["trainer.callbacks[0].init_args.betas[1]", "0.5"],
        ["trainer.callbacks[1].class_path", "b.Second"],
        ["trainer.max_steps", "5"],
        ["trainer.text", "a long text that goes on"],
    ]


def test_another_cost_draws_another_front(opened, write_run):
    from selenium.webdriver.support.select import Select

    for seed, steps in enumerate((1.0, 4.0)):
        write_run(f"steps-{seed}", 0, {"test/acc": 0.5 + 0.1 * seed, "test/nfe": steps}, params=10 + seed)
    browser = opened(*SIZES[1])
    Select(find(browser, "select[data-plot=cost]")).select_by_visible_text("steps")
    front = browser.execute_script("return document.getElementById('cost').data[0].x")
    assert front == [1, 4]
    assert fits(browser)


@pytest.mark.parametrize("size", SIZES, ids=["desktop", "phone"])
def test_a_picture_is_drawn_fits_and_runs_nothing(opened, write_run, size):
    folder = write_run("kd", 9, panels={"picture": PICTURE})
    (folder / "trees.svg").write_text(SVG)
    browser = opened(*size)  # an alert would make the next command fail
    assert browser.execute_script("return document.querySelector('.picture img').naturalWidth") == 96
    assert fits(browser)


def test_the_first_tab_reaches_the_skip_link(opened):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser = opened(*SIZES[0])
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert browser.switch_to.active_element.text == "Skip to the results"


@pytest.mark.parametrize("size", SIZES, ids=["desktop", "phone"])
def test_another_metric_draws_other_curves(opened, size):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    browser = opened(*size)
    drawn = "return document.getElementById('curves').data.filter(trace => trace.name).map(trace => trace.y)"
    title = "return document.querySelector('#curves .ytitle').textContent"
    before = browser.execute_script(drawn)
    assert browser.execute_script(title) == "val accuracy in %"
    Select(browser.find_element(By.CSS_SELECTOR, "select[data-plot=curves]")).select_by_visible_text("train/loss")
    after = browser.execute_script(drawn)
    assert len(before) == len(after) == 4
    assert after[0] == pytest.approx([1.75, 1.5, 1.25, 1.0])
    assert before[0] != after[0]
    assert browser.execute_script(title) == "train loss ↓"


def test_a_row_is_hidden_in_every_figure_and_shown_again_by_keyboard(opened):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser = opened(*SIZES[1])
    button = browser.find_element(By.CSS_SELECTOR, ".legend button[data-row=kd]")
    panel = browser.find_element(By.CSS_SELECTOR, "figure[data-row=kd]")

    def rows():
        ids = "['dots', 'differences', 'curves', 'cost']"
        return browser.execute_script(f"return {ids}.map(id => document.getElementById(id).data.map(t => t.meta))")

    assert all("kd" in drawn for drawn in rows())
    button.send_keys(Keys.SPACE)
    assert not any("kd" in drawn for drawn in rows())
    assert all("fitnets" in drawn for drawn in rows())
    assert (button.get_attribute("aria-pressed"), panel.is_displayed()) == ("false", False)
    button.send_keys(Keys.ENTER)
    assert all("kd" in drawn for drawn in rows())
    assert (button.get_attribute("aria-pressed"), panel.is_displayed()) == ("true", True)


def test_dark_mode_changes_the_colours_of_the_plots(opened):
    from selenium.webdriver.support.wait import WebDriverWait

    browser = opened(*SIZES[0])
    try:
        for scheme, ink in (("light", "#1b1f23"), ("dark", "#e7eaec")):
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            colour = "return document.getElementById('curves').layout.font.color"
            WebDriverWait(browser, 10).until(lambda page, ink=ink, colour=colour: page.execute_script(colour) == ink)
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_hostile_text_runs_nothing_in_the_browser(opened, hostile):
    from selenium.webdriver.support.wait import WebDriverWait

    browser = opened(*SIZES[1])  # an alert would make the next command fail
    assert browser.execute_script("return document.querySelectorAll('img, svg[onload], .plot b').length") == 0
    for box in browser.execute_script("return [...document.querySelectorAll('table.runs input.pick')]"):
        browser.execute_script("arguments[0].click()", box)
    assert len(diff(browser)) > 1
    assert (
        browser.execute_script("return document.querySelectorAll('img, svg[onload], #diff b, .chosen b').length") == 0
    )
    plot = "[...document.querySelectorAll('[id$=-dots]')].at(-1)"
    browser.execute_script(f"{plot}.scrollIntoView({{behavior: 'instant'}})")
    drawn = f"return {plot}.querySelector('.main-svg') && {plot}.textContent"
    text = WebDriverWait(browser, 10).until(lambda page: page.execute_script(drawn))
    assert "<" in text  # a name is there, as letters
    assert fits(browser)
