"""One engine over several nodes, here processes of this machine: the tokens of one, and nobody hangs."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax import JaxEngineConfig
from lmdeploy_jax.assets import EXAMPLE_IMAGE, TINY_VISION
from lmdeploy_jax.engine.core.published import Publisher, Result, Run
from lmdeploy_jax.engine.io.frontend import Frontend
from lmdeploy_jax.engine.nodes.channel import Channel
from lmdeploy_jax.engine.nodes.cluster import Follower, Leader, _check_alike
from lmdeploy_jax.engine.nodes.settings import check_leads, check_nodes
from lmdeploy_jax.engine.prepare import prepare
from lmdeploy_jax.engine.process.remote import RemoteEngine
from lmdeploy_jax.errors import ConfigError, EngineError
from lmdeploy_jax.vl import encode_image_base64
from tests.engine.harness import Collector, config, generate, submit, tokens
from tests.patience import PATIENCE, post, wait_until
from tests.server.live import serving

BOUND = 20.0  # seconds in which everybody learns of a lost node, on a busy machine
ROOT = Path(__file__).parents[2]


@contextmanager
def nodes(model, folder, count=2, **changes):
    """The leader's engine, and the processes that follow it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = config(folder, tp=count, nnodes=count, dist_init_addr=address, **changes)
    command = [sys.executable, "-m", "lmdeploy_jax", "serve", "api_server", str(model)]
    for name, default in vars(JaxEngineConfig()).items():
        if name != "node_rank" and (value := getattr(options, name)) != default:
            command += [f"--{name}" if value is True else f"--{name}={value}"]
    followers = [
        subprocess.Popen([*command, f"--node_rank={rank}"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(1, count)
    ]
    engine = None
    try:
        engine = RemoteEngine(model, options, progress=False)
        yield engine, followers
    finally:
        if engine is not None:
            engine.close()
        for follower in followers:
            with suppress(subprocess.TimeoutExpired):
                follower.communicate(timeout=BOUND)
            follower.kill()
            follower.communicate()


def endless(engine):
    """What collects the answer of a request that still runs."""
    collector = Collector()
    submit(engine, [5], collector, max_new_tokens=500)
    wait_until(lambda: collector.results[0].outputs)
    return collector


def test_two_nodes_give_the_model_s_tokens_and_a_lost_follower_ends_in_an_error(
    llama, prompts, expected, compile_cache
):
    with nodes(llama, compile_cache) as (engine, [follower]):
        assert tokens(engine, prompts[:1], max_new_tokens=len(expected[0])) == expected[:1]
        collector = endless(engine)
        follower.kill()
        killed = time.monotonic()
        [result] = collector.wait()
        assert result.reason == "error"
        wait_until(lambda: not engine._reader.is_alive())
        assert time.monotonic() - killed < BOUND
        with pytest.raises(EngineError, match="node 1"):
            submit(engine, [5], Collector())


def reported(engine):
    """What a request is told whose arrays stay on the devices in between."""
    [[result]] = generate(engine, [[5, 6, 7]], max_new_tokens=4, logprobs=2, logits="generation")
    return np.concatenate([out.logits for out in result.outputs if out.logits is not None])


@pytest.mark.full
def test_nodes_report_sleep_and_end_together(llama, engine, prompts, expected, compile_cache):
    count, logits = len(expected[0]), reported(engine)
    with nodes(llama, compile_cache, 4) as (engine, followers):
        assert tokens(engine, prompts, max_new_tokens=count) == expected
        np.testing.assert_allclose(reported(engine), logits, atol=1e-3)
        for level in (1, 2):
            engine.sleep(level)
            engine.wake()
            assert tokens(engine, prompts, max_new_tokens=count) == expected
        engine.close()
        assert [follower.wait(PATIENCE) for follower in followers] == [0, 0, 0]


@pytest.mark.full
def test_images_and_forms_are_served_by_two_nodes(compile_cache):
    picture = {"url": f"data:image/png;base64,{encode_image_base64(EXAMPLE_IMAGE)}"}
    asked = [
        {"type": "text", "text": "What is the colour of the star?"},
        {"type": "image_url", "image_url": picture},
    ]
    body = {"messages": [{"role": "user", "content": asked}], "temperature": 0}
    with (
        nodes(TINY_VISION, compile_cache, max_prefill_token_num=256) as (engine, _),
        serving(Frontend.from_engine(engine, prepare(TINY_VISION))) as live,
    ):
        for form in ({}, {"guided_choice": ["green", "blue", "red"]}):
            answer = post(f"{live.url}/v1/chat/completions", json=body | form).json()
            assert answer["choices"][0]["message"]["content"] == "blue"


@pytest.mark.full
def test_followers_end_with_their_leader(llama, compile_cache):
    with nodes(llama, compile_cache) as (engine, [follower]):
        endless(engine)
        engine._process.kill()
        assert follower.wait(BOUND) != 0


def test_nodes_with_other_options_are_told_which():
    first, second = ({"max_batch_size": size, "the version of jax": "0.11.2"} for size in (4, 8))
    with pytest.raises(ConfigError, match="max_batch_size is 8 on node 1 and 4 on node 0"):
        _check_alike([first, second])


def test_strangers_are_no_nodes():
    key = os.urandom(8)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(2) as threads:
        address = listener.getsockname()
        leader = threads.submit(Leader, listener, key, 2)
        socket.create_connection(address).close()
        with pytest.raises(AuthenticationError):
            Client(address, authkey=b"a guess")
        follower = Follower(address, key, 1, 2)
        given = threads.submit(follower.exchange, "follower's")
        assert leader.result(PATIENCE).exchange("leader's") == ["leader's", "follower's"]
        assert given.result(PATIENCE) == ["leader's", "follower's"]
        leader.result().close("it broke")
        with pytest.raises(EngineError, match="node 0 has failed: it broke"):
            follower.next_message()


def channels(silence, lost):
    here, there = multiprocessing.Pipe()
    return Channel(here, "node 1", lost, silence=silence), there


def test_a_follower_without_a_way_to_its_leader_says_where_it_looked():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(
        EngineError, match=rf"node 1 has no way to node 0 at 127\.0\.0\.1:{port},.*at every port"
    ):
        Follower(("127.0.0.1", port), b"key", 1, 2)


def test_a_side_that_says_nothing_is_lost():
    told = []
    channel, _there = channels(0.2, told.append)
    with pytest.raises(EngineError, match="node 1"):
        channel.receive()
    wait_until(lambda: told)
    assert told == ["node 1 said nothing for 0.2 s"]


def test_beats_keep_a_silent_side_alive_and_a_closed_one_is_not_lost():
    told = []
    channel, there = channels(0.2, told.append)
    other = Channel(there, "node 0", told.append, silence=0.2)
    time.sleep(0.6)
    other.send("still here")
    assert channel.receive() == "still here"
    assert not told
    channel.send("the last")
    channel.close()
    assert other.receive() == "the last"
    with pytest.raises(EngineError):
        other.receive()
    assert not told


def test_a_side_that_fails_is_lost_at_once():
    told = []
    channel, there = channels(PATIENCE, told.append)
    Channel(there, "node 0", told.append).drop()
    with pytest.raises(EngineError):
        channel.receive()
    wait_until(lambda: told)
    assert told == ["node 1 has gone"]


def test_an_array_travels_as_its_number_and_is_forgotten_once_it_is_gone():
    told = []
    publisher = Publisher(told.append)
    array = publisher.numbered(jnp.ones(1))
    publisher.run(("head", 1), {"rows": array, "packed": [2]})
    del array
    publisher.run(("head", 1), {"packed": [3]})
    publisher.run(("head", 1), {"packed": [4]})
    key = ("head", 1)
    assert told == [
        Run(key, {"rows": Result(0), "packed": [2]}, []),
        Run(key, {"packed": [3]}, [0]),
        Run(key, {"packed": [4]}, []),
    ]


GOOD = {"tp": 2, "nnodes": 2, "dist_init_addr": "10.0.0.1:29500"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"node_rank": 2}, "node_rank=2 is beyond nnodes=2: the ranks are 0 to 1"),
        ({"tp": 3}, "tp=3 devices do not share out evenly over nnodes=2"),
        ({"dp": 2}, "dp=2 is not supported with nnodes=2: start a server for each copy"),
        ({"dist_init_addr": None}, "dist_init_addr=None is no address of node 0"),
        ({"dist_init_addr": "10.0.0.1"}, "give the same HOST:PORT on every node"),
        ({"dist_init_addr": "[::1]:29500"}, "a name or IPv4 address"),
        ({"dist_init_addr": "host:99999"}, "is no address"),
    ],
)
def test_what_cannot_work_is_refused_by_name(changes, named):
    with pytest.raises(ConfigError) as raised:
        check_nodes(JaxEngineConfig(**GOOD | changes))
    assert named in str(raised.value)


def test_a_follower_takes_no_requests():
    check_nodes(JaxEngineConfig(**GOOD))
    with pytest.raises(ConfigError, match=r"only node 0 takes requests.*--nnodes 2"):
        check_leads(JaxEngineConfig(**GOOD, node_rank=1))
