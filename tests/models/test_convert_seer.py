"""Released folders of Seer, made small, into pipeline folders."""

import json
from dataclasses import replace

import pytest
import torch
from support_seer import tiny_stable_diffusion
from torch import nn

from stvision.cli import convert as command
from stvision.models.convert_seer import convert_seer, find_release, load_state
from stvision.models.fstext import FSTextDecomposer
from stvision.models.seer import SeerUNetModel

IMAGE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
}


def random_models() -> tuple[SeerUNetModel, FSTextDecomposer]:
    torch.manual_seed(5)
    unet = SeerUNetModel(**IMAGE)
    fstext = FSTextDecomposer(dim=16, num_layers=2, num_heads=8, max_frames=4, max_tokens=9)
    for model in (unet, fstext):
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    return unet.eval(), fstext.eval()


@pytest.fixture
def release(tmp_path):
    unet, fstext = random_models()
    folder = tmp_path / "sthv2_seer" / "learned_sdunet-steps-200000"
    folder.mkdir(parents=True)
    (folder.parent / "learned_sdunet-steps-1000").mkdir()
    wrapped = {"module." + key: value for key, value in unet.state_dict().items()}
    torch.save(wrapped, folder / "pytorch_model.bin")
    torch.save(fstext.state_dict(), folder / "pytorch_model_1.bin")
    return folder, unet, fstext


def outputs(unet: SeerUNetModel, fstext: FSTextDecomposer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 3, 8, 8, generator=generator)
    with torch.no_grad():
        text = fstext(torch.randn(1, 6, 16, generator=generator), 3)
        return unet(sample, 30, text).sample


def test_released_folder_gives_the_same_predictions(release) -> None:
    folder, *models = release
    assert find_release(folder.parent) == find_release(folder)
    assert torch.equal(outputs(*convert_seer(folder.parent, IMAGE)), outputs(*models))


def test_misfits_are_named_in_one_sentence(release, tmp_path) -> None:
    folder, *_ = release
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        convert_seer(tmp_path / "nowhere", IMAGE)
    with pytest.raises(FileNotFoundError, match="pytorch_model_1.bin"):
        convert_seer(folder.parent / "learned_sdunet-steps-1000", IMAGE)
    with pytest.raises(ValueError, match=r"\d+ of another shape \(.* instead of "):
        convert_seer(folder, {**IMAGE, "cross_attention_dim": 20})
    state = load_state(folder / "pytorch_model.bin")
    freqs = next(key for key in state if key.endswith("freqs"))
    changed = {**state, freqs: state[freqs] * 2}
    torch.save(changed, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not the standard frequencies"):
        convert_seer(folder, IMAGE)
    changed = {k: v for k, v in state.items() if k != "conv_in.bias"} | {"odd": torch.zeros(1)}
    torch.save(changed, folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"1 missing \(conv_in.bias\); 1 unexpected \(odd\)"
    ) as caught:
        convert_seer(folder, IMAGE)
    assert "\n" not in str(caught.value)


class _Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys) -> None:
    torch.save({"x": _Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is not a file of weights"):
        load_state(tmp_path / "pytorch_model.bin")
    assert "executed" not in capsys.readouterr().out
    (tmp_path / "text.bin").write_text("hello")
    with pytest.raises(ValueError, match="is not a file of weights"):
        load_state(tmp_path / "text.bin")
    torch.save([torch.zeros(1)], tmp_path / "list.bin")
    with pytest.raises(ValueError, match="something else than tensors"):
        load_state(tmp_path / "list.bin")


@pytest.fixture
def stable_diffusion(tmp_path):
    """A Stable Diffusion folder of tiny random parts."""
    return tiny_stable_diffusion(tmp_path / "sd", IMAGE)


def test_command_writes_a_pipeline_folder(release, stable_diffusion, tmp_path, capsys) -> None:
    from stvision.pipelines.seer import SeerPipeline

    folder, *models = release
    out = tmp_path / "seer"
    given = command.Command(kind="seer", path=folder, output=out, sd=str(stable_diffusion))
    command.run(given)
    assert "wrote" in capsys.readouterr().out
    command.run(replace(given, output=tmp_path / "again", json=True, local_files_only=True))
    told = json.loads(capsys.readouterr().out)
    assert (told["output"], told["num_frames"]) == (str(tmp_path / "again"), 12)
    parts = {"unet", "fstext", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert parts <= {item.name for item in out.iterdir()}
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "SeerPipeline"
    pipeline = SeerPipeline.from_pretrained(out)
    assert (pipeline.config.num_frames, pipeline.config.num_reference_frames) == (12, 2)
    assert pipeline.scheduler.config.beta_start == 0.00085
    assert torch.equal(outputs(pipeline.unet, pipeline.fstext), outputs(*models))
    with pytest.raises(FileExistsError, match="not an empty folder"):
        command.run(given)
    given.output, given.sd = tmp_path / "other", str(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no diffusers folder or hub name"):
        command.run(given)
    given.num_frames = 2
    with pytest.raises(ValueError, match="num_reference_frames must be between 1 and"):
        command.run(given)
    assert not given.output.exists()
