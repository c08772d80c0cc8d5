"""The suite's own rule: a test may be skipped only for want of a device."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
CONFTEST = Path(__file__).with_name("conftest.py")


@pytest.mark.parametrize(
    ("body", "workers", "passes"),
    [
        ("pytest.skip('needs GPU')", [], True),
        ("pytest.skip('needs TPU')", [], True),
        ("pytest.skip('torch is missing')", [], False),
        ("pytest.skip('torch is missing')", ["-n", "1"], False),
        ("pytest.xfail('later')", [], False),
    ],
)
def test_only_a_missing_device_excuses_a_test(
    pytester: pytest.Pytester, body: str, workers: list[str], passes: bool
) -> None:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(f"import pytest\ndef test_it():\n    {body}\ndef test_other():\n    pass\n")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *workers)
    assert (result.ret == 0) == passes


def test_a_skipped_module_fails_the_run(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile("import pytest\npytest.importorskip('a_module_that_does_not_exist')\n")
    assert pytester.runpytest_subprocess("-p", "no:cacheprovider").ret != 0
