"""LMDeploy's flags: neutral values are taken, others are told of or refused with a reason."""

from __future__ import annotations

import logging

import pytest

from lmdeploy_jax.cli import chat, serve
from lmdeploy_jax.cli.flags import FlagSet, UsageError
from lmdeploy_jax.cli.lmdeploy_flags import ENGINE, SPECULATION, check_lmdeploy_flags, ssl_files

# Every flag of `lmdeploy serve api_server` 0.16, as a line that asks for nothing out of the ordinary.
LINE = """
--server-name 0.0.0.0 --server-port 23333 --allow-origins * --allow-methods * --allow-headers *
--max-concurrent-requests 8 --allowed-media-domains a.example b.example --backend turbomind
--log-level WARNING --api-keys a b --model-name m --max-log-len 10 --disable-fastapi-docs
--allow-terminate-by-client --enable-abort-handling --trust-remote-code --tool-call-parser qwen
--reasoning-parser default --generation-config auto --device cuda --eager-mode --logprobs-mode None
--dllm-unmasking-strategy low_confidence_dynamic --dllm-confidence-threshold 0.85
--distributed-executor-backend uni --kernel-block-size -1 --prefix-cache-state-budget 0
--prefix-cache-decode-state-interval 0 --role Hybrid --migration-backend DLSlime --language-model-only
--cudagraph-capture-batch-sizes 1 2 --dtype auto --tp 1 --dp 1 --ep 1 --session-len 2048 --max-batch-size 8
--cache-max-entry-count 0.8 --cache-block-seq-len 64 --enable-prefix-caching --max-prefill-token-num 8192
--quant-policy 0 --model-format hf --hf-overrides {} --disable-metrics --nnodes 1 --node-rank 0 --cp 1
--rope-scaling-factor 0.0 --num-tokens-per-iter 0 --max-prefill-iters 1 --async 1 --communicator nccl
--vision-max-batch-size 1 --speculative-num-draft-tokens 1 --ssl --allow-credentials
"""
REFUSED = {
    "adapters": "a=b", "cache_block_seq_len": "32", "cp": "2", "device": "ascend", "dllm_block_length": "4",
    "dllm_denoising_steps": "4", "logprobs_mode": "raw_logits", "role": "Prefill", "rope_scaling_factor": "2",
    "speculative_algorithm": "eagle3", "speculative_draft_model": "m",
}  # fmt: skip
SWITCHES = ("enable_eplb",)
TUNING = ("enable_microbatch",)


def parsed(*words: str) -> FlagSet:
    flags = FlagSet()
    serve.define(flags)
    assert flags.parse(["api_server", "m", *words]) == ["api_server", "m"]
    return flags


def test_a_whole_line_of_lmdeploys_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lmdeploy_jax")
    flags = parsed(*LINE.split())
    check_lmdeploy_flags(flags)
    told = [record.getMessage().split()[0] for record in caplog.records]
    assert told == ["--cudagraph-capture-batch-sizes", "--distributed-executor-backend"]
    assert flags["api_keys"] == ["a", "b"]
    assert flags["allowed_media_domains"] == ["a.example", "b.example"]


def test_every_flag_is_tried() -> None:
    tried = {word[2:].replace("-", "_") for word in LINE.split() if word.startswith("--")}
    assert {*ENGINE, *SPECULATION} <= tried | REFUSED.keys() | {*SWITCHES, *TUNING}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_missing_is_refused_with_a_reason(name: str) -> None:
    flag = name.replace("_", "-")
    with pytest.raises(UsageError, match=f"^--{flag} {REFUSED[name]} is not supported: [A-Za-z-]+ .*"):
        check_lmdeploy_flags(parsed(f"--{flag}", REFUSED[name]))


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_that_cannot_be_honoured_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is not supported"):
        check_lmdeploy_flags(parsed(f"--{name}"))


def test_ssl_finds_its_files_as_lmdeploys_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_KEYFILE", raising=False)
    monkeypatch.delenv("SSL_CERTFILE", raising=False)
    assert ssl_files(parsed()) == {}
    with pytest.raises(UsageError, match="--ssl needs SSL_KEYFILE and SSL_CERTFILE"):
        ssl_files(parsed("--ssl"))
    monkeypatch.setenv("SSL_KEYFILE", "key.pem")
    monkeypatch.setenv("SSL_CERTFILE", "certificate.pem")
    assert ssl_files(parsed("--ssl")) == {"ssl_keyfile": "key.pem", "ssl_certfile": "certificate.pem"}


def test_the_help_says_what_each_is_good_for() -> None:
    flags = FlagSet()
    chat.define(flags)
    text = " ".join(flags.help().split())
    assert "--cp TEXT 1 alone: tp cuts every layer, and dp copies the whole model; leave it out." in text
    assert "--communicator TEXT has no meaning here" in text
    assert "--proxy-url" not in text
