"""The check of local links, on a page that has each kind of a broken one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "docs" / "check_links.py"


def check(site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(site)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_broken_link_fails(tmp_path: Path) -> None:
    (tmp_path / "b.html").write_text('<p id="x">')
    good = '<a id="own" href="b.html#x"><a href="#own"><a href="b.html?q=1"><a href="http://e/#x">'
    (tmp_path / "a.html").write_text(good)
    assert check(tmp_path).returncode == 0
    broken = ["#gone", "b.html#y", "c.html", "c.png"]
    links = "".join(f'<a href="{link}">' for link in broken[:3])
    (tmp_path / "a.html").write_text(f'{good}{links}<img src="{broken[3]}">')
    result = check(tmp_path)
    expected = [f"{tmp_path / 'a.html'}: {link}" for link in broken]
    assert result.returncode == 1 and result.stderr.splitlines() == ["broken links:", *expected]


def test_a_site_that_is_not_there_fails(tmp_path: Path) -> None:
    result = check(tmp_path / "nowhere")
    assert result.returncode == 1 and "build it first" in result.stderr
