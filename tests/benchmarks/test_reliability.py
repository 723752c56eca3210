"""The page of `make chaos`, which is made from pytest's JUnit reports."""

from pathlib import Path

import pytest

from sidestack.benchmarks.reliability import cases, main, rows

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest">
<testcase name="a"><properties>
  <property name="fault" value="kill" /><property name="faults" value="6" /><property name="seconds" value="4.5" />
  <property name="measure" value="seconds to resume" /><property name="steps_lost" value="3" />
</properties></testcase>
<testcase name="b"><properties>
  <property name="fault" value="kill" /><property name="faults" value="5" /><property name="seconds" value="9.5" />
</properties><failure message="it differs">...</failure></testcase>
<testcase name="c"><properties><property name="fault" value="stop" /></properties></testcase>
<testcase name="not of a fault" />
</testsuite></testsuites>
"""


@pytest.fixture
def report(tmp_path: Path) -> Path:
    file = tmp_path / "report.xml"
    file.write_text(REPORT, encoding="utf-8")
    return file


def test_faults_of_a_failed_test_count_as_not_survived(report: Path) -> None:
    kill, stop = rows(list(cases([report])))
    assert (kill["tried"], kill["survived"], kill["median_s"], kill["most_s"], kill["steps_lost"]) == (11, 6, 7, 9.5, 3)
    assert kill["seconds_of"] == "seconds to resume"
    assert (stop["tried"], stop["survived"], stop["median_s"], stop["steps_lost"]) == (1, 1, None, None)


def test_last_report_counts_for_a_test_in_two_reports(report: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.xml"
    again.write_text(REPORT.replace('<failure message="it differs">...</failure>', ""), encoding="utf-8")
    kill, _ = rows(list(cases([report, again])))
    assert (kill["tried"], kill["survived"]) == (11, 11)


def test_page_has_totals_and_table(report: Path, tmp_path: Path) -> None:
    main([str(report), "--out", str(tmp_path)])
    page = (tmp_path / "reliability.md").read_text(encoding="utf-8")
    assert page.startswith("# Reliability: 12 faults, 7 survived\n")
    assert "| kill | 11 | 6 | 7.0 | 9.5 | seconds to resume | 3 |" in page
