"""What is wrong with a model's name, files or template is told before anything is loaded."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from lmdeploy_jax import JaxEngineConfig, pipeline
from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.cli.main import main
from lmdeploy_jax.converters.vision_config import read_vision
from lmdeploy_jax.engine.core import engine
from lmdeploy_jax.engine.decoder_config import check_ep
from lmdeploy_jax.engine.prepare import prepare
from lmdeploy_jax.engine.process import remote
from lmdeploy_jax.errors import ConfigError, LmdeployError
from lmdeploy_jax.models.mlp_config import MixtureConfig, MlpConfig, RouterConfig
from tests.models.test_program import CONFIG


@pytest.fixture(autouse=True)
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here gets as far as an engine."""

    def loading(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded before everything had been checked")

    monkeypatch.setattr(engine, "set_up", loading)
    monkeypatch.setattr(remote, "_start", loading)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY_CHAT, tmp_path / "model"))


@pytest.mark.parametrize(
    ("tp", "ep", "experts", "reason"),
    [
        (2, 2, 0, "ep=2 deals out experts, and this model has none; leave ep out"),
        (1, 2, 4, "ep=2 does not divide tp=1"),
        (4, 4, 6, "ep=4 does not divide the model's 6 experts"),
        (4, 2, 6, None),
    ],
)
def test_experts_that_cannot_be_dealt_out_are_told(
    tp: int, ep: int, experts: int, reason: str | None
) -> None:
    mlp = MixtureConfig(RouterConfig(experts, 2), MlpConfig(8)) if experts else MlpConfig(8)
    config, model = (
        JaxEngineConfig(tp=tp, ep=ep),
        replace(CONFIG, layers=(replace(CONFIG.layers[0], mlp=mlp),)),
    )
    with nullcontext() if reason is None else pytest.raises(ConfigError, match=reason):
        check_ep(config, model)


def test_a_prepared_model_is_all_but_its_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model = prepare(folder)
    assert (model.folder, model.model_config.vocab_size) == (folder, 2560)
    assert model.tokenizer.decode(model.tokenizer.encode("hello")) == "hello"
    assert "hello" in model.template.render([{"role": "user", "content": "hello"}])


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def broken_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% if %}")


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NopeForCausalLM"]}))


def test_overrides_reach_what_becomes_of_images(tmp_path: Path) -> None:
    from tests.engine.test_images import save  # makes checkpoints with torch, which the rest here is spared

    folder, overrides = save("llava", tmp_path), {"vision_feature_layer": -1}
    given = prepare(folder, JaxEngineConfig(hf_overrides=overrides)).vision
    assert given == read_vision(folder, overrides) != read_vision(folder)


@pytest.mark.parametrize(
    ("damage", "text"),
    [(without_tokenizer, "tokenizer.json"), (broken_template, "template"), (unknown_architecture, "Nope")],
)
def test_damaged_folders(damage, text, folder, capsys):
    damage(folder)
    with pytest.raises(LmdeployError, match=text):
        pipeline(str(folder))
    for command in (["chat", str(folder)], ["serve", "api_server", str(folder)]):
        assert main(command) == 1
        assert text in capsys.readouterr().err


@pytest.mark.parametrize("command", [["chat"], ["serve", "api_server"]])
def test_a_chat_template_of_no_name(command, capsys):
    assert main([*command, "--chat-template", "nope"]) == 2
    assert "nope" in capsys.readouterr().err


def test_generation_config_of_the_checkpoint(folder, capsys):
    (folder / "generation_config.json").write_text('{"temperature": 17}')
    for command in (["chat", str(folder)], ["serve", "api_server", str(folder)]):
        assert main(command) == 1
        told = capsys.readouterr().err
        assert "generation_config.json" in told
        assert "temperature=17" in told


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--tool-call-parser", "nope"], "'nope'"),
        (["--reasoning-parser", "nope"], "'nope'"),
        (["--generation-config", "/no/such/folder"], "/no/such/folder"),
        (["--server-name", "256.1.1.1"], "256.1.1.1"),
        (["--log-level", "LOUD"], "LOUD"),
    ],
)
def test_options_of_the_server(flags, text, capsys):
    assert main(["serve", "api_server", *flags]) in (1, 2)
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["ssl_certfile", "ssl_keyfile"])
def test_tls_files_are_named(missing, tmp_path, capsys):
    files = {name: tmp_path / f"{name}.pem" for name in ("ssl_certfile", "ssl_keyfile")}
    for name, path in files.items():
        if name != missing:
            path.write_text("no PEM")
    flags = [f"--{name}={path}" for name, path in files.items()]
    assert main(["serve", "api_server", *flags]) == 1
    assert f"{missing}='{files[missing]}' cannot be read: No such file" in capsys.readouterr().err
    files[missing].write_text("no PEM either")
    assert main(["serve", "api_server", *flags]) == 1
    assert "PEM" in capsys.readouterr().err
    with pytest.raises(ssl.SSLError):
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*files.values())


def test_a_port_in_use(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "api_server", "--server-name=127.0.0.1", f"--server-port={port}"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert f"server_port={port}: cannot listen there: Address already in use" in err
