"""`make clients`: install real clients, each in an environment of its own, and run each against running pipelines.

One pipeline has the demo model and the stand-in, another the simulated engine, whose answers take seconds. The scripts
in `python`, `javascript` and `java` print what each client could do. The table of it is printed, and `--write` puts it
into docs/clients.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.running import ALONE, ROOT, up
from tests.clients.environments import Client, Unavailable, clients

PAGE = ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- The table of `make clients` -->\n", "<!-- End of the table -->\n"
CHECKS = ("chat", "stream", "tools", "form", "responses", "embeddings", "errors", "cancel", "retry", "priority")
# The longest script takes a minute on two busy cores.
RUN_TIMEOUT_S = 400
UNLIMITED = {"HTTP_ANSWERS_PER_S": "0", "HTTP_LISTS_PER_S": "0", "HTTP_STATISTICS_PER_S": "0"}
FREE_PORTS = {"NATS_PORT": "0", "HTTP_PORT": "0"}
# Sixty tokens at twenty a second: longer than the clients wait that try again.
SLOW = {
    "ENGINE": "simulated",
    "SLOTS": "2",
    "SIMULATED_ANSWER_TOKENS": "60",
    "SIMULATED_TOKENS_PER_S": "20",
    **ALONE,
}
Results = dict[str, dict[str, str]]


@contextmanager
def pipelines() -> Iterator[dict[str, str]]:
    """Two pipelines, and their addresses as the scripts read them."""
    with tempfile.TemporaryDirectory() as name:
        here, slow = Path(name) / "here", Path(name) / "slow"
        here.mkdir()
        slow.mkdir()
        with (
            up(here, {**FREE_PORTS, **UNLIMITED, "OLLAMA_HOST": "none"}) as fast,
            up(slow, {**FREE_PORTS, **UNLIMITED, **SLOW}) as other,
        ):
            yield {"HEADRACE_URL": fast["http"], "HEADRACE_SLOW_URL": other["http"]}


def tried(client: Client, folder: Path, addresses: dict[str, str], *, loud: bool) -> Results:
    """What one client's script found out, by check. What it did not report has failed."""
    environment = client.installed(folder)
    # LiteLLM would fetch its list of prices.
    more = {**addresses, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = subprocess.run(
                environment.command(),
                cwd=scratch,
                env=environment.environ(more),
                capture_output=True,
                text=True,
                timeout=RUN_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"chat": {"result": "no", "note": f"the script ran longer than {RUN_TIMEOUT_S} s"}}
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    results = {line["check"]: line for line in found}
    if loud or any(line["result"] == "no" for line in found):
        sys.stderr.write(done.stderr[-4000:])
    if done.returncode or not results:
        results["chat"] = {"result": "no", "note": done.stderr.strip()[-300:]}
    return results


def cell(results: Results, check: str) -> str:
    """yes, **no** or a dash."""
    word = results.get(check, {"result": "none"})["result"]
    return {"yes": "yes", "no": "**no**", "none": "–"}[word]


def row(client: Client, results: Results) -> str:
    """The client's line of the table."""
    return f"| {client.name} | {client.version} | " + " | ".join(cell(results, check) for check in CHECKS) + " |"


def notes(client: Client, results: Results) -> list[str]:
    """What the script said of checks that passed or failed, as items of a list."""
    said = {check: line["note"] for check, line in results.items() if line["note"] and line["result"] != "none"}
    return [f"- {client.name}, {check}: {note}." for check, note in said.items()]


def main() -> None:
    """Try the clients that are asked for."""
    parser = argparse.ArgumentParser(prog="make clients", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="clients whose names contain one of the words")
    parser.add_argument("--write", action="store_true", help="put the table into docs/clients.md")
    parser.add_argument("--loud", action="store_true", help="show what the clients write to stderr")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv" / "clients", help="where they are installed")
    chosen = parser.parse_args()
    words = [word.lower() for word in chosen.only or [""]]
    wanted = [client for client in clients() if any(word in client.name.lower() for word in words)]
    table = [f"| client | version | {' | '.join(CHECKS)} |", "|---" * (len(CHECKS) + 2) + "|"]
    print(*table, sep="\n", flush=True)
    said, failed = list[str](), 0
    with pipelines() as addresses:
        for client in wanted:
            try:
                results = tried(client, chosen.folder, addresses, loud=chosen.loud)
            except Unavailable as reason:
                said.append(f"- {client.name} is not tried: {reason}.")
                print(said[-1], flush=True)
                continue
            table.append(row(client, results))
            said += notes(client, results)
            failed += sum(line["result"] == "no" for line in results.values())
            print(table[-1], flush=True)
    print(*said, sep="\n")
    if chosen.write:
        text = "\n".join([*table, "", *said, ""])
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
