"""SeerPipeline: the shared contract, and what is Seer's own."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from pipeline_contract import PipelineContract
from support_seer import tiny_seer_components, tiny_seer_pipeline

from stvision.io import Clip, open_video, save_clip
from stvision.models.sampling import NonFiniteLatentsError, make_scheduler, randn_per_sample
from stvision.models.text import packaged_minilm_folder
from stvision.pipelines.budget import parse_bytes
from stvision.pipelines.conditioning import frames_to_tensor
from stvision.pipelines.folders import resolve_folder
from stvision.pipelines.results import DriftMeter
from stvision.pipelines.seer import SeerPipeline
from stvision.pipelines.sizes import SizeRules

PROMPTS = ["open the drawer", "push the red cup to the left", "close the door"]


def clips(count: int, frames: int = 2, seed: int = 0) -> list[Clip]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, frames, 16, 16, 3, generator=generator)
    return [Clip.from_frames(item, fps=4.0) for item in pixels]


class TestSeerKeepsTheContract(PipelineContract):
    def build(self):
        return tiny_seer_pipeline()

    def inputs(self, count):
        return {"prompt": PROMPTS[:count], "frames": clips(count)}

    def only(self, inputs, index):
        return {name: [value[index]] for name, value in inputs.items()}


@pytest.fixture(scope="module")
def pipe():
    return tiny_seer_pipeline()


def predict(pipe, prompt="open the drawer", frames=None, **options):
    frames = clips(1)[0] if frames is None else frames
    return pipe(prompt, frames, **{"generator": 3, "output_type": "pt", **options})


# -- reference frames ---------------------------------------------------------------------------


def test_reference_frames_are_the_vaes_reconstruction(pipe):
    clip = clips(1)[0]
    output = predict(pipe, frames=clip)
    with torch.no_grad():
        pixels = clip.frames.movedim(-1, 1) * 2 - 1
        expected = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    torch.testing.assert_close(
        output.frames[0, :2], (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0
    )
    assert output.frames.shape == (1, 5, 3, 16, 16)


def test_every_kind_of_input_means_the_same_picture(pipe):
    array = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    expected = predict(pipe, frames=array).frames
    images = [Image.fromarray(frame) for frame in array]
    tensor = torch.from_numpy(array).float() / 255
    for other in (images, torch.from_numpy(array), tensor, [array], array[None]):
        torch.testing.assert_close(predict(pipe, frames=other).frames, expected, atol=2e-5, rtol=0)


def test_one_image_is_a_reference(pipe):
    picture = Image.fromarray(
        np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    )
    alone = pipe("close the door", image=picture, generator=1, output_type="pt")
    as_clip = pipe("close the door", [picture], generator=1, output_type="pt")
    assert torch.equal(alone.frames, as_clip.frames)
    two = pipe(["open", "close"], image=[picture, picture], generator=1, output_type="pt")
    assert two.frames.shape[0] == 2
    torch.testing.assert_close(two.times[0], torch.arange(5, dtype=torch.float64) / 4)


def test_only_the_first_frames_are_references(pipe):
    long = clips(1, frames=6)[0]
    assert torch.equal(predict(pipe, frames=long).frames, predict(pipe, frames=long[:2]).frames)
    one = predict(pipe, frames=long, num_reference_frames=1)
    assert torch.equal(one.frames, predict(pipe, frames=long[:1]).frames)
    assert not torch.allclose(one.frames, predict(pipe, frames=long).frames, atol=1e-3)
    with pytest.raises(ValueError, match="num_reference_frames is 3, but .* only 2 frames"):
        predict(pipe, num_reference_frames=3)


def test_iterators_and_open_readers_give_no_more_than_is_used(pipe, tmp_path):
    whole = clips(1, frames=4)[0]
    expected = predict(pipe, frames=whole).frames
    given = iter(whole.frames)
    assert torch.equal(predict(pipe, frames=given).frames, expected)
    assert torch.equal(next(given), whole.frames[2])  # two references were taken
    save_clip(whole, tmp_path / "clip.mp4")
    with open_video(tmp_path / "clip.mp4") as reader:
        from_reader = predict(pipe, frames=reader).frames
    assert torch.equal(from_reader, predict(pipe, frames=tmp_path / "clip.mp4").frames)
    with pytest.raises(ValueError, match="the iterator of frames ends before second 0"):
        predict(pipe, frames=iter([]))


def test_a_stream_keeps_no_finished_frames(pipe):
    kept = []
    for chunk in pipe.stream("open the drawer", clips(1)[0], num_frames=14, generator=0):
        kept.append(weakref.ref(chunk))
        del chunk
        gc.collect()
        assert [ref() is not None for ref in kept[:-1]] == [False] * (len(kept) - 1)
    assert len(kept) == 4


def test_longer_clips_may_differ_in_length(pipe):
    long, longer = clips(1, frames=3)[0], clips(1, frames=7, seed=1)[0]
    output = predict(pipe, frames=[long, longer], generator=[3, 3])
    for index, clip in enumerate((long, longer)):
        alone = predict(pipe, frames=clip[:2]).frames[0]
        torch.testing.assert_close(output.frames[index], alone, atol=2e-4, rtol=0)
    one = predict(pipe, frames=[long[:1], longer], num_reference_frames=1)
    assert one.frames.shape[:2] == (2, 5)


def test_other_shapes_are_covered_and_cut_in_the_middle():
    frames = torch.zeros(1, 10, 40, 3)
    frames[:, :, 15:25] = 1.0  # the middle square is white
    tensor = frames_to_tensor(Clip.from_frames(frames, fps=1.0), 10, 10)
    assert tensor.shape == (3, 1, 10, 10) and bool((tensor == 1).all())
    larger = frames_to_tensor(Clip.from_frames(frames, fps=1.0), 20, 20)
    assert larger.shape == (3, 1, 20, 20) and larger[..., 2:-2].min() > 0.9


def test_times_continue_those_of_the_reference(pipe):
    clip = clips(1)[0]
    clip.times = clip.times + 2.5
    output = predict(pipe, frames=clip)
    assert output.times[0].tolist() == [2.5, 2.75, 3.0, 3.25, 3.5] and output.fps == [4.0]
    fractional = predict(pipe, frames=clips(1, frames=1)[0], fps=29.97)
    assert fractional.fps == [29.97]
    torch.testing.assert_close(fractional.times[0], torch.arange(5, dtype=torch.float64) / 29.97)
    # References of a faster clip are taken at the asked rate.
    fast = Clip.from_frames(torch.rand(9, 16, 16, 3), fps=8.0)
    output = predict(pipe, frames=fast, fps=2.0)
    assert output.times[0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert torch.equal(output.frames[0, :2], predict(pipe, frames=fast[[0, 4]]).frames[0, :2])
    with pytest.raises(ValueError, match="above the clip's own rate 8"):
        predict(pipe, frames=fast, fps=30.0)


# -- text ---------------------------------------------------------------------------------------


def test_the_sentence_decides(pipe):
    first, second = predict(pipe).frames, predict(pipe, prompt="push the cup").frames
    assert torch.equal(first[:, :2], second[:, :2])
    assert not torch.allclose(first[:, 2:], second[:, 2:], atol=1e-3)


def test_guidance_reads_raw_states_that_the_decomposer_never_saw(pipe):
    shown = []

    def watch(module, inputs, output):
        shown.append(inputs[0].shape[0])

    seen = {}

    def callback(pipeline, step, timestep, tensors):
        seen.update(tensors)
        return {}

    handle = pipe.fstext.register_forward_hook(watch)
    try:
        predict(
            pipe,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["prompt_embeds", "negative_prompt_embeds"],
        )
    finally:
        handle.remove()
    assert shown == [1]
    raw = pipe.encode_prompt([""])
    assert torch.equal(seen["negative_prompt_embeds"], raw[:, None].expand(-1, 5, -1, -1))
    with torch.no_grad():
        expected = pipe.fstext(pipe.encode_prompt(["open the drawer"]), 5)
    torch.testing.assert_close(seen["prompt_embeds"], expected, atol=1e-6, rtol=0)


def test_negative_prompt_and_scale_matter_only_with_guidance(pipe):
    base = predict(pipe)
    assert not torch.allclose(predict(pipe, negative_prompt="red").frames, base.frames, atol=1e-4)
    off = predict(pipe, guidance_scale=1.0).frames
    assert torch.equal(predict(pipe, guidance_scale=0.5, negative_prompt="red").frames, off)
    with pytest.raises(ValueError, match="negative_prompt holds 2 entries for 1 videos"):
        predict(pipe, negative_prompt=["red", "blue"])


def test_embeddings_instead_of_sentences(pipe):
    embeds = pipe.encode_prompt(["open the drawer"])
    same = predict(pipe, prompt=None, prompt_embeds=embeds)
    torch.testing.assert_close(same.frames, predict(pipe).frames, atol=1e-5, rtol=0)
    lean = SeerPipeline(**{**tiny_seer_components(), "tokenizer": None, "text_encoder": None},
                        num_frames=5, num_inference_steps=3, guidance_scale=3.0,
                        num_reference_frames=2, fps=4.0)  # fmt: skip
    lean.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        predict(lean)
    empty = pipe.encode_prompt([""])
    bare = predict(lean, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=empty)
    torch.testing.assert_close(bare.frames, same.frames, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="give either prompt or prompt_embeds"):
        predict(pipe, prompt_embeds=embeds)


def test_a_sentence_per_time_span(pipe):
    seen = {}

    def callback(pipeline, step, timestep, tensors):
        seen.update(tensors)
        return {}

    predict(
        pipe,
        prompt={0: "open the drawer", 0.75: "close the door"},
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    with torch.no_grad():
        states = pipe.fstext(pipe.encode_prompt(["open the drawer", "close the door"]), 5)
    # 4 frames a second: frames 0, 1, 2 are before 0.75 s, frame 3 is at it.
    expected = torch.cat([states[:1, :3], states[1:, 3:]], dim=1)
    torch.testing.assert_close(seen["prompt_embeds"], expected, atol=1e-6, rtol=0)
    constant = predict(pipe, prompt={0: "open the drawer", 9: "close the door"})
    torch.testing.assert_close(constant.frames, predict(pipe).frames, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="begins at 0"):
        predict(pipe, prompt={1.0: "open"})


def test_one_prompt_serves_all_clips_and_one_clip_all_prompts(pipe):
    both = clips(2)
    tolerance = {"atol": 2e-4, "rtol": 0}
    wide = predict(pipe, frames=both, generator=[3, 3])
    for index in range(2):
        torch.testing.assert_close(
            wide.frames[index], predict(pipe, frames=both[index]).frames[0], **tolerance
        )
    texts = predict(pipe, prompt=PROMPTS[:2], generator=[3, 3], negative_prompt=["red", "blue"])
    for index, negative in enumerate(["red", "blue"]):
        alone = predict(pipe, prompt=PROMPTS[index], negative_prompt=negative)
        torch.testing.assert_close(texts.frames[index], alone.frames[0], **tolerance)
    mixed = predict(pipe, prompt=["open the drawer", {0: "push", 0.5: "open the drawer"}],
                    frames=both, generator=[3, 4], num_videos_per_prompt=1)  # fmt: skip
    torch.testing.assert_close(mixed.frames[0], wide.frames[0], **tolerance)


def test_embeddings_are_spread_like_sentences(pipe):
    states = pipe.encode_prompt(PROMPTS[:2])
    expected = predict(
        pipe, prompt=PROMPTS[:2], num_videos_per_prompt=2, generator=[1, 2, 3, 4],
        negative_prompt=["red", "blue"],
    )  # fmt: skip
    given = predict(
        pipe, prompt=None, prompt_embeds=states, num_videos_per_prompt=2, generator=[1, 2, 3, 4],
        negative_prompt_embeds=pipe.encode_prompt(["red", "blue"]),
    )  # fmt: skip
    torch.testing.assert_close(given.frames, expected.frames, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"negative_prompt_embeds must be \(B, L, D\), got \(8,"):
        predict(pipe, negative_prompt_embeds=states[0, :, :])


def test_time_spans_of_each_video_count_at_its_own_rate(pipe):
    seen = {}

    def callback(pipeline, step, timestep, tensors):
        seen.update(tensors)
        return {}

    slow, quick = clips(1)[0], Clip.from_frames(clips(1)[0].frames, fps=8.0)
    spans = {0: "open the drawer", 0.25: "push the cup", 0.5: "close the door"}
    predict(
        pipe, prompt=spans, frames=[slow, quick], generator=[1, 2], callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )  # fmt: skip
    with torch.no_grad():
        states = pipe.fstext(pipe.encode_prompt(list(spans.values())), 5)
    frames = torch.arange(5)
    for video, which in enumerate([[0, 1, 2, 2, 2], [0, 0, 1, 1, 2]]):
        expected = states[torch.tensor(which), frames]
        torch.testing.assert_close(seen["prompt_embeds"][video], expected, atol=1e-6, rtol=0)


# -- noise and schedules ------------------------------------------------------------------------


def test_given_latents_replace_the_noise(pipe):
    noise = randn_per_sample((1, 4, 3, 8, 8), 3)
    assert torch.equal(predict(pipe, latents=noise, generator=99).frames, predict(pipe).frames)
    with pytest.raises(
        ValueError, match=r"latents must be .*\(1, 4, 3, 8, 8\), got \(1, 4, 5, 8, 8\)"
    ):
        predict(pipe, latents=torch.zeros(1, 4, 5, 8, 8))


def test_any_scheduler_and_the_authors_schedule(pipe, tmp_path):
    before = pipe.scheduler
    try:
        for scheduler in (
            make_scheduler("authors"),
            EulerDiscreteScheduler.from_config(before.config),
        ):
            pipe.scheduler = scheduler
            frames = predict(pipe, num_inference_steps=4).frames
            assert torch.isfinite(frames).all()
            pipe.save_pretrained(tmp_path)
            loaded = SeerPipeline.from_pretrained(tmp_path)
            loaded.set_progress_bar_config(disable=True)
            assert type(loaded.scheduler) is type(scheduler)
            assert torch.equal(predict(loaded, num_inference_steps=4).frames, frames)
    finally:
        pipe.scheduler = before


def test_a_broken_network_raises_instead_of_writing_black_frames():
    pipe = tiny_seer_pipeline()
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(NonFiniteLatentsError, match="after step 0 .*'conv_out'"):
        predict(pipe)
    pipe = tiny_seer_pipeline()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias[0] = float("inf")
    with pytest.raises(ValueError, match="VAE decoded frames that are not finite"):
        predict(pipe)


# -- longer than trained --------------------------------------------------------------------------


def test_roll_out_begins_with_the_short_video_and_hands_its_end_on(pipe):
    short = predict(pipe, output_type="latent").frames
    long = predict(pipe, num_frames=12, output_type="latent")
    assert long.frames.shape[2] == 12
    assert torch.equal(long.frames[:, :, :5], short)
    # 5, then 3 new frames a window: the second window is a call with the last two as references.
    generator = torch.Generator().manual_seed(3)
    torch.randn(4, 3, 8, 8, generator=generator)
    text, negative = pipe.encode_prompt(["open the drawer"]), pipe.encode_prompt([""])
    from stvision.models.sampling import denoise, text_per_frame

    with torch.no_grad():
        second = denoise(
            pipe.unet, pipe.scheduler, torch.randn(1, 4, 3, 8, 8, generator=generator),
            short[:, :, -2:], pipe.fstext(text, 5), negative_text=text_per_frame(negative, 5),
            guidance_scale=3.0, num_inference_steps=3, cond_frames=2,
        )  # fmt: skip
    torch.testing.assert_close(long.frames[:, :, 5:8], second, atol=1e-5, rtol=1e-5)
    assert long.times.shape == (1, 12) and torch.allclose(
        long.times.diff(), torch.tensor(0.25).double()
    )


def test_a_stream_yields_the_same_frames_window_by_window(pipe):
    whole = predict(pipe, num_frames=12)
    chunks = list(
        pipe.stream("open the drawer", clips(1)[0], num_frames=12, generator=3, output_type="pt")
    )
    assert [chunk.frames.shape[1] for chunk in chunks] == [5, 3, 3, 1]
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks], 1), whole.frames)
    assert torch.equal(torch.cat([chunk.times for chunk in chunks], 1), whole.times)
    assert chunks[-1].drift == whole.drift
    with pytest.raises(ValueError, match="height"):  # checked before the first chunk is asked for
        pipe.stream("open", clips(1)[0], height=3)


def test_a_stream_can_be_left_and_interrupted(pipe):
    stream = pipe.stream("open the drawer", clips(1)[0], num_frames=10**6, generator=3)
    first = next(stream)
    assert len(first.frames[0]) == 5
    stream.close()
    stream = pipe.stream("open the drawer", clips(1)[0], num_frames=10**6, generator=3)
    next(stream)
    pipe.interrupt = True
    rest = list(stream)
    assert len(rest) <= 1


@pytest.mark.parametrize("end", ["exhausted", "closed", "interrupted", "failed"])
def test_offload_hooks_are_freed_however_a_stream_ends(pipe, monkeypatch, end):
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    length = 5 if end == "exhausted" else 10**6
    stream = pipe.stream("open the drawer", clips(1)[0], num_frames=length, generator=3)
    next(stream)
    if end == "exhausted":
        assert list(stream) == []
    elif end == "closed":
        stream.close()
    elif end == "interrupted":
        pipe.interrupt = True
        list(stream)
    else:
        monkeypatch.setattr(pipe, "_denoise", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(stream)
    assert freed == [True]


def test_a_prompt_span_reaches_over_windows(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        if step == 0:
            seen.append(tensors["prompt_embeds"])
        return {}

    predict(
        pipe, prompt={0: "open the drawer", 1.5: "close the door"}, num_frames=8,
        callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )  # fmt: skip
    with torch.no_grad():
        states = pipe.fstext(pipe.encode_prompt(["open the drawer", "close the door"]), 5)
    # The second window shows frames 3 to 7; 1.5 s is frame 6.
    expected = torch.cat([states[:1, :3], states[1:, 3:]], dim=1)
    torch.testing.assert_close(seen[1], expected, atol=1e-6, rtol=0)


def test_windows_that_cannot_move_on_are_refused(pipe):
    with pytest.raises(ValueError, match="window must exceed overlap"):
        predict(pipe, window=3, overlap=3, num_frames=9)
    with pytest.raises(ValueError, match="must exceed their number 2, got 2"):
        predict(pipe, num_frames=2)
    three = predict(pipe, window=4, overlap=1, num_frames=9)
    assert three.frames.shape[1] == 9


def test_drift_measures_brightness_and_colour():
    meter = DriftMeter()
    grey = torch.full((1, 3, 2, 4, 4), 0.5)
    assert meter.update(grey)[0].brightness == pytest.approx(0)
    brighter = meter.update(grey + 0.2)[0]
    assert brighter.brightness == pytest.approx(0.2) and brighter.colour == pytest.approx(0)
    red = grey.clone()
    red[:, 0] += 0.3
    tinted = meter.update(red)[0]
    assert tinted.brightness == pytest.approx(0.2126 * 0.3)
    assert tinted.colour == pytest.approx(
        ((-0.2126 * 0.3 / 1.8556) ** 2 + (0.7874 * 0.3 / 1.5748) ** 2) ** 0.5
    )


def test_latents_of_windows_of_three_frames_are_joined_along_time(pipe):
    # Three frames look like three channels.
    options = {"frames": clips(1, frames=1)[0], "window": 3, "num_frames": 5}
    latents = predict(pipe, **options, output_type="latent")
    assert latents.frames.shape == (1, 4, 5, 8, 8)
    with torch.no_grad():
        decoded = (pipe.decode(latents.frames).transpose(1, 2) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, predict(pipe, **options).frames, atol=1e-5, rtol=0)
    three = predict(pipe, **{**options, "num_frames": 3}, output_type="latent")
    with pytest.raises(ValueError, match="latents are no pictures"):
        three.clips()


# -- inputs that do not go together ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "give either prompt or prompt_embeds"),
        ({"prompt": []}, "at least one sentence"),
        ({"prompt": [3]}, "a prompt is a sentence or a mapping"),
        ({"image": Image.new("RGB", (16, 16))}, "give either frames .* or image"),
        ({"prompt": ["a", "b", "c"], "frames": clips(2)}, "frames holds 2 entries for 3 videos"),
        (
            {"frames": [clips(1)[0], clips(1, frames=1)[0]]},
            r"have \[2, 1\] frames of the 2 .* give num_reference_frames=1",
        ),
        ({"prompt": {"soon": "open"}}, "mapping from seconds to sentences"),
        ({"negative_prompt": [3]}, "negative_prompt must be a sentence or a list"),
        ({"frames": []}, "an empty list holds no frames"),
        ({"generator": [1, 2, 3]}, "3 entries for a batch of 1"),
        ({"attention_backend": "fast"}, "attention backend must be one of"),
        ({"fps": 0}, "fps must be positive"),
    ],
)
def test_bad_arguments_are_named(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        predict(pipe, **options)


def test_attention_backends_agree(pipe):
    plain = predict(pipe).frames
    written_out = predict(pipe, attention_backend="math").frames
    torch.testing.assert_close(written_out, plain, atol=1e-4, rtol=0)


# -- folders ----------------------------------------------------------------------------------------


def test_sizes_are_known_from_the_folder_alone(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    rules = SeerPipeline.size_rules(tmp_path)
    assert rules == pipe.rules == SizeRules(multiple=4)
    assert rules.nearest(17, 3) == (16, 4)
    with pytest.raises(ValueError, match="width must be a multiple of 4 pixels, got 3"):
        rules.check(16, 3)


def test_packaged_text_is_referred_to_and_not_written(tmp_path):
    try:
        packaged_minilm_folder()
    except ImportError as error:
        pytest.skip(str(error))
    parts = tiny_seer_components()
    del parts["tokenizer"], parts["text_encoder"]
    pipe = SeerPipeline(**parts, text_model="minilm", max_text_length=8)
    assert pipe.encode_prompt(["open the drawer"]).shape == (1, 8, 384)
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "text_encoder").exists() and not (tmp_path / "tokenizer").exists()
    assert pipe.text_encoder is not None
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_model"] == "minilm" and index["text_encoder"] == [None, None]
    loaded = SeerPipeline.from_pretrained(tmp_path)
    assert torch.equal(
        loaded.encode_prompt(["open the drawer"]), pipe.encode_prompt(["open the drawer"])
    )
    with pytest.raises(
        ValueError, match="text_model must be 'minilm', 'open_clip:MODEL/WEIGHTS' or None, got 't5'"
    ):
        SeerPipeline(**parts, text_model="t5")


def test_names_of_folders(tmp_path, monkeypatch):
    assert resolve_folder(tmp_path) == tmp_path
    import stvision

    monkeypatch.setattr(stvision, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="'default' are not part of this installation"):
        resolve_folder("default")
    with pytest.raises(FileNotFoundError, match="no pipeline folder at"):
        resolve_folder("./somewhere/else")
    with pytest.raises(FileNotFoundError, match="no pipeline 'owner/name': .* hub did not give it"):
        resolve_folder("owner/name", local_files_only=True)


@pytest.mark.parametrize(
    ("text", "count"),
    [(5, 5), ("5", 5), ("8GB", 8 * 10**9), ("7.5 GiB", 7.5 * 2**30), ("512 mib", 2**29), ("9b", 9)],
)
def test_byte_budgets(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "8 TB", "-1GB", "much", 0, float("nan")])
def test_bad_byte_budgets(text):
    with pytest.raises(ValueError, match="a byte budget"):
        parse_bytes(text)
