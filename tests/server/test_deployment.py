"""What `configs/docker` says about the server is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import lmdeploy_jax
from lmdeploy_jax.cli import serve
from lmdeploy_jax.cli.flags import FlagSet
from lmdeploy_jax.server.options import DEFAULT_PORT, ServerOptions
from tests import patience

ROOT = Path(lmdeploy_jax.__file__).parent.parent
DOCKER = ROOT / "configs" / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
KUBERNETES = list(yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text()))
POD = next(part for part in KUBERNETES if part["kind"] == "Deployment")["spec"]["template"]["spec"]
SERVERS = ("cpu", "cuda12")


def test_the_board_asks_for_what_the_server_counts(live, client):
    client.completions.create(model="tiny-chat", prompt="a", max_tokens=2, temperature=0)
    counted = set(re.findall(r"^([\w:]+?)(?:\{| )", patience.get(live.url + "/metrics").text, re.M))
    board = json.loads((DOCKER / "grafana" / "board.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"lmdeploy_jax:\w+", target["expr"])
    }
    assert len(asked) > 12
    assert asked <= counted


def commands():
    return [COMPOSE["services"][name]["command"] for name in SERVERS] + [POD["containers"][0]["args"]]


@pytest.mark.parametrize("command", commands())
def test_the_flags_are_the_servers(command):
    flags = FlagSet()
    serve.define(flags)
    model, *rest = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in command]
    assert flags.parse([model, *rest]) == [model]
    assert flags["model_name"] == rest[rest.index("--model-name") + 1]


def test_time_to_drain():
    seconds = [int(COMPOSE["services"][name]["stop_grace_period"][:-1]) for name in SERVERS]
    assert min(seconds) > ServerOptions.drain_seconds
    args = POD["containers"][0]["args"]
    assert POD["terminationGracePeriodSeconds"] > float(args[args.index("--drain-seconds") + 1])


def test_one_port_everywhere():
    assert POD["containers"][0]["ports"][0]["containerPort"] == DEFAULT_PORT
    scraped = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert scraped["static_configs"][0]["targets"] == [f"server:{DEFAULT_PORT}"]
    for name in SERVERS:
        assert COMPOSE["services"][name]["ports"] == [f"{DEFAULT_PORT}:{DEFAULT_PORT}"]
        assert f"EXPOSE {DEFAULT_PORT}" in (DOCKER / f"Dockerfile.{name}").read_text()


def test_what_the_files_mount_and_copy_is_there():
    for name in ("prometheus", "grafana"):
        for volume in COMPOSE["services"][name]["volumes"]:
            if volume.startswith("./"):
                assert (DOCKER / volume.split(":")[0]).is_file()
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert kept
    assert all((ROOT / name).exists() for name in kept)
