"""The accounts: they balance, or the message says which unit does not; and the reject gate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmemb_ray.errors import OutputError, RejectsExceeded, RunFailed
from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.receipt import PATH, Receipt, make_receipt, reconcile
from llmemb_ray.storage import Storage
from tests.shards.small_plan import commit_of, small_plan

PLAN = small_plan()
COMMITS = [commit_of(unit) for unit in PLAN.units()]


def receipt_of(commits: list[Commit] | None = None) -> Receipt:
    return make_receipt(PLAN, COMMITS if commits is None else commits, seconds_wall=1.0, versions={"torch": "2.13.0"}, finished=5.0)


def test_a_receipt_sums_its_commits_up() -> None:
    commits = list(COMMITS)
    commits[1] = replace(commits[1], embedded=commits[1].embedded - 4, filtered=4)
    commits[2] = replace(commits[2], reasons={"empty": 1}, token_budget=256, null_ids=2)
    receipt = receipt_of(commits)
    units = len(COMMITS)
    assert (receipt.units, receipt.rows_embedded, receipt.rows_rejected, receipt.rows_filtered) == (units, 55 - units - 4, units, 4)
    assert receipt.rows_read == receipt.rows_embedded + receipt.rows_rejected
    assert receipt.rejects_by_reason == {"null": units - 1, "empty": 1}
    assert receipt.tokens == 7 * 55
    assert receipt.token_budgets == [256, 512]
    assert receipt.null_ids == 2
    assert receipt.bad_files == {"/in/c.parquet": "is empty (0 bytes)"}
    assert receipt.reject_rate == units / 51


def test_a_receipt_comes_back_as_it_was(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert Receipt.load(storage) is None
    receipt_of().save(storage)
    assert Receipt.load(storage) == receipt_of()
    for broken in (b"", b"[]", b'{"units": 3}'):
        storage.put(PATH, broken)
        with pytest.raises(OutputError, match=r"_llmemb/receipt\.json is no receipt of this version"):
            Receipt.load(storage)


def test_version_changes_are_told() -> None:
    receipt = make_receipt(PLAN, COMMITS, seconds_wall=0, versions={"torch": "2.14.0"}, finished=0)
    assert receipt.version_changes == ["torch: 2.13.0 → 2.14.0"]


NAME = COMMITS[1].unit


@pytest.mark.parametrize(
    ("commits", "problem"),
    [
        (COMMITS[:1] + COMMITS[2:], f"unit {NAME} has no commit"),
        ([*COMMITS, COMMITS[1]], f"unit {NAME} has 2 commits"),
        ([*COMMITS, replace(COMMITS[0], unit="000009-000000000000")], "commit 000009-000000000000 belongs to no unit of the plan"),
        ([COMMITS[0], replace(COMMITS[1], embedded=5), *COMMITS[2:]], f"unit {NAME} has 7 rows, its commit accounts for 5 \\+ 1 \\+ 0"),
        ([COMMITS[0], replace(COMMITS[1], rows=9, embedded=8), *COMMITS[2:]], f"unit {NAME} has 7 rows, its commit accounts for 8 \\+ 1 \\+ 0"),
        ([], "has no commit.*Run the embed command again, it does the units without a commit"),
    ],
)
def test_accounts_that_do_not_balance_name_the_unit(commits: list[Commit], problem: str) -> None:
    with pytest.raises(RunFailed, match=rf"the accounts do not balance: .*({problem})"):
        receipt_of(commits)


@given(st.data())
def test_any_lost_or_doubled_row_is_noticed(data: st.DataObject) -> None:
    which = data.draw(st.integers(0, len(COMMITS) - 1))
    field = data.draw(st.sampled_from(["embedded", "rejected", "filtered", "rows"]))
    by = data.draw(st.integers(-3, 3).filter(bool))
    spoilt = replace(COMMITS[which], **{field: getattr(COMMITS[which], field) + by})
    with pytest.raises(RunFailed, match=spoilt.unit):
        reconcile(PLAN, [*COMMITS[:which], spoilt, *COMMITS[which + 1 :]])


def test_a_large_plan_is_reconciled_in_no_time() -> None:
    """Quadratic work would take minutes here."""
    plan = small_plan(files=[replace(PLAN.files[0], group_rows=(20_000,), rows=20_000, rows_per_unit=1)])
    reconcile(plan, [commit_of(unit) for unit in plan.units()])


@pytest.mark.parametrize(
    ("rejected", "embedded", "rate", "floor", "passes"),
    [
        (0, 100, 0.0, 0, True),
        (1, 99, 0.01, 0, True),
        (2, 98, 0.01, 0, False),
        (10, 0, 0.01, 10, True),
        (11, 0, 0.01, 10, False),
        (11, 1089, 0.01, 10, True),
        (50, 50, 1.0, 0, True),
    ],
)
def test_the_reject_gate_and_its_floor(rejected: int, embedded: int, rate: float, floor: int, passes: bool) -> None:
    reasons = {"null": rejected - rejected // 3, "empty": rejected // 3}
    receipt = replace(receipt_of(), rows_read=embedded + rejected, rows_embedded=embedded, rows_rejected=rejected, rejects_by_reason=reasons)
    if passes:
        receipt.check_rejects(rate, floor, "OUT")
        return
    with pytest.raises(RejectsExceeded) as caught:
        receipt.check_rejects(rate, floor, "OUT")
    message = str(caught.value)
    assert message.startswith(f"{rejected} of {embedded + rejected} rows were rejected (")
    assert f"{reasons['null']} null" in message
    assert "OUT/rejects" in message
    assert "max_reject_rate" in message
