"""The documentation site builds without a warning, every link and picture resolves, and a browser shows every page."""

import functools
import http.server
import re
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest
from processes import ROOT, attempt

import lorasb

WORDS = 1200  # limit per page; 800 for the README
LONG = {"api", "evidence"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = attempt("-m", "mkdocs", "build", "--strict", "--site-dir", folder, NO_MKDOCS_2_WARNING="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return folder


class Page(HTMLParser):
    """A page's links and anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        link = found.get("href") if tag in ("a", "link") else found.get("src")
        if link:
            self.links.append(link)


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    """All pages, by path below the site's root."""
    files = (file for file in site.rglob("*.html") if file.name != "404.html")
    return {str(file.relative_to(site)): Page(file.read_text(encoding="utf-8")) for file in files}


def test_a_page_is_read_in_a_few_minutes() -> None:
    pages = {page.stem: page for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"] if page.stem not in LONG}
    words = {name: len(page.read_text(encoding="utf-8").split()) for name, page in pages.items()}
    assert {name: count for name, count in words.items() if count > (800 if name == "README" else WORDS)} == {}


def test_every_link_inside_the_site_resolves(site: Path, pages: dict[str, Page]) -> None:
    assert len(pages) > 20
    broken = []
    for name, page in pages.items():
        for link in page.links:
            if urlparse(link).scheme or link.startswith(("//", "data:")):
                continue
            path, anchor = urldefrag(urljoin(f"/{name}", unquote(link)))
            target = path.lstrip("/") + ("index.html" if path.endswith("/") else "")
            if not (site / target).is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{name}: {link}")
    assert broken == []


def test_links_into_the_repository_lead_to_files_that_are_there(pages: dict[str, Page]) -> None:
    start = re.compile(r"https://github.com/lorasb/lorasb/(?:blob|tree)/main/([^#]+)")
    named = {match[1] for page in pages.values() for link in page.links if (match := start.match(link))}
    assert named
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


def test_every_public_name_is_in_the_reference(pages: dict[str, Page]) -> None:
    known = {name for name in lorasb.__all__ if name not in ("__version__", "functional", "optim")}
    assert [name for name in known if f"lorasb{name}".lower() not in pages["api/index.html"].anchors] == []


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def browser() -> Iterator[Any]:
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("needs Debian's chromium and chromium-driver, which make test-all installs")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def errors_of(browser: Any) -> list[str]:
    """Errors in the console, except for pictures from other hosts, which this machine cannot reach."""
    entries = browser.get_log("browser")
    return [e["message"] for e in entries if e["level"] == "SEVERE" and "127.0.0.1" in e["message"]]


@pytest.mark.long
def test_a_browser_loads_every_page_and_search_finds_words(pages: dict[str, Page], address: str, browser: Any) -> None:
    for name in pages:
        browser.get(f"{address}/{name}")
        assert errors_of(browser) == [], name
        assert browser.find_element("css selector", "h1").text, name
        broken = browser.execute_script(
            "return [...document.images].filter(i => i.src.includes('127.0.0.1') && i.complete && !i.naturalWidth).map(i => i.src)"
        )
        assert broken == [], name
    browser.get(address)
    box = browser.find_element("css selector", "input.md-search__input")
    browser.execute_script("document.querySelector('#__search').click()")
    box.send_keys("resume")
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20).until(lambda d: d.find_elements("css selector", ".md-search-result__link"))
    assert browser.find_elements("css selector", ".md-search-result__link")
    assert errors_of(browser) == []


@pytest.mark.long
@pytest.mark.parametrize("width", [1280, 390])
def test_no_page_is_wider_than_its_window(pages: dict[str, Page], address: str, browser: Any, width: int) -> None:
    browser.set_window_size(width, 900)
    for name in pages:
        browser.get(f"{address}/{name}")
        wide, window = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= window + 1, name
