"""``create_backbone(pretrained="owner/name")`` from a hub cache, with no network at all."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from torch import nn

from stvision.models.backbones import create_backbone
from stvision.models.weights import read_options, read_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = {"depths": (1, 1), "embed_dims": (8, 16), "num_heads": (2, 4), "window_size": 3}


class Cache:
    """A hub cache in the layout of huggingface_hub: blobs, a reference, a snapshot of links."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def repository(self, name: str) -> Path:
        return self.root / f"models--{name.replace('/', '--')}"

    def add(self, name: str, file: str, content: bytes) -> None:
        repository = self.repository(name)
        snapshot = repository / "snapshots" / COMMIT
        for folder in (repository / "refs", repository / "blobs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(COMMIT)
        blob = repository / "blobs" / f"{file}-blob"
        blob.write_bytes(content)
        (snapshot / file).symlink_to(os.path.relpath(blob, snapshot))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    def refuse(*args: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return Cache(tmp_path / "hub")


def source(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return create_backbone("davit_tiny", **({"num_classes": 5} | SMALL | options)).eval()


def safetensors(model: nn.Module, folder: Path) -> bytes:
    save_file(model.state_dict(), folder / "a.safetensors")
    return (folder / "a.safetensors").read_bytes()


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_weights_of_a_cached_repository(prefix: str, cache: Cache, tmp_path: Path) -> None:
    model = source()
    cache.add("someone/davit", "model.safetensors", safetensors(model, tmp_path))
    # other repositories have a config.json too, which says other things
    theirs = {"kind": "another", "num_classes": 9, "options": {"num_classes": 9}}
    cache.add("someone/davit", "config.json", json.dumps(theirs).encode())
    name = f"{prefix}someone/davit"
    loaded = create_backbone("davit_tiny", name, num_classes=5, **SMALL).eval()
    x = torch.randn(2, 3, 37, 42)
    assert torch.equal(loaded(x), model(x))
    assert read_options(name) == {}


def test_a_pickle_where_there_are_no_safetensors(cache: Cache, tmp_path: Path) -> None:
    model = source()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.bin")
    cache.add("someone/davit", "pytorch_model.bin", (tmp_path / "a.bin").read_bytes())
    state = read_weights("someone/davit")
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


def test_a_converted_repository_says_its_arguments(cache: Cache, tmp_path: Path) -> None:
    model = source(in_chans=2)
    cache.add("someone/grey", "model.safetensors", safetensors(model, tmp_path))
    options = {"num_classes": 5, "in_chans": 2}
    config = {"kind": "stvision backbone", "backbone": "davit_tiny", "options": options}
    cache.add("someone/grey", "config.json", json.dumps(config).encode())
    loaded = create_backbone("davit_tiny", "someone/grey", **SMALL).eval()
    x = torch.randn(1, 2, 20, 33)
    assert torch.equal(loaded(x), model(x))
    assert create_backbone("davit_tiny", "someone/grey", num_classes=3, **SMALL).num_classes == 3


def test_what_is_not_there_is_one_sentence(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="is no path here, and the hub does not give it"):
        create_backbone("davit_tiny", "someone/unknown")
    cache.add("someone/empty", "README.md", b"nothing")
    with pytest.raises(FileNotFoundError, match="someone/empty.*the hub does not give it"):
        create_backbone("davit_tiny", "someone/empty")
    with monkeypatch.context() as patch:  # a hub that answers, with none of the files

        def none(name: str, file: str) -> str:
            raise EntryNotFoundError(f"404: {file}")

        patch.setattr(huggingface_hub, "hf_hub_download", none)
        with pytest.raises(
            FileNotFoundError, match="someone/empty holds none of model.safetensors"
        ):
            create_backbone("davit_tiny", "someone/empty")
    for name in ("davit", "a/b/c", "./a", "a/"):
        with pytest.raises(FileNotFoundError, match="neither a file, a folder nor owner/name"):
            create_backbone("davit_tiny", name)


def test_the_environment_names_the_cache(tmp_path: Path) -> None:
    """As a user runs it: a process of its own, HF_HUB_CACHE and HF_HUB_OFFLINE alone."""
    model = source()
    cache = Cache(tmp_path / "elsewhere")
    cache.add("someone/davit", "model.safetensors", safetensors(model, tmp_path))
    code = f"""
import torch
from stvision import create_backbone
model = create_backbone("davit_tiny", "someone/davit", num_classes=5, **{SMALL}).eval()
print(model(torch.ones(1, 3, 20, 33)).double().sum().item())
"""
    environment = os.environ | {"HF_HUB_CACHE": str(cache.root), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    wanted = model(torch.ones(1, 3, 20, 33)).double().sum().item()
    assert abs(float(done.stdout) - wanted) < 1e-5
