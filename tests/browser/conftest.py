import pytest

from tests.browser import chromium, many_pairs


@pytest.fixture(scope="session")
def browser():
    browser = chromium.Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    """A report of 10,000 pairs, and what is in it."""
    return many_pairs.write(tmp_path_factory.mktemp("many"), 10_000)


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """The same of 500 pairs."""
    return many_pairs.write(tmp_path_factory.mktemp("few"), 500)
