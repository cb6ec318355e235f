"""`headrace auth`: a tenant's account, once; what the account can do is in tests/security."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.commands.auth import account


def test_an_account_is_appended_to_the_file_and_only_its_owner_reads_it(tmp_path: Path, capsys):
    file = tmp_path / "tenants.conf"
    file.write_text("# ours\n")
    assert main(["auth", "acme", "--file", str(file)]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert shown["user"] == "acme"
    assert file.read_text() == "# ours\n" + account("acme", shown["password"])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert main(["auth", "acme-2", "--file", str(file)]) == 0
    assert file.read_text().count("users:") == 2


def test_a_tenant_has_one_account(tmp_path: Path, capsys):
    file = tmp_path / "tenants.conf"
    assert main(["auth", "acme", "--file", str(file)]) == 0
    written = file.read_text()
    assert main(["auth", "acme", "--file", str(file)]) == 1
    assert "already has the tenant" in capsys.readouterr().err
    assert file.read_text() == written


def test_without_a_file_the_account_is_printed(capsys):
    assert main(["auth", "acme"]) == 0
    assert capsys.readouterr().out.startswith("  TENANT_acme: {\n    users: [")


@pytest.mark.parametrize("tenant", ["a.b", "a b", "*", "", "client", "pipeline", "default", 'a"', "x" * 65])
def test_a_name_that_cannot_be_a_tenant_is_refused(tenant: str, tmp_path: Path, capsys):
    file = tmp_path / "tenants.conf"
    assert main(["auth", tenant, "--file", str(file)]) == 2
    assert "is not a valid tenant" in capsys.readouterr().err
    assert not file.exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, capsys):
    assert main(["auth", "acme", "--file", str(tmp_path / "none" / "tenants.conf")]) == 2
    assert "Cannot write" in capsys.readouterr().err
