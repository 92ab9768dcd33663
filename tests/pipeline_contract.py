"""What every video pipeline of this project keeps; a pipeline's test class inherits it.

A subclass says how to build a tiny pipeline of real components and what to call it with; it
asserts nothing of its own here. Randomness must come from ``generator`` alone.
"""

import json
import socket

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from stvision.models.fast import enable_fast
from stvision.pipelines.results import OUTPUT_TYPES, VideoOutput


def state_of(pipeline) -> dict:
    """Everything about components and switches that a call could leave changed."""
    state = {}
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            state[name] = {k: v.clone() for k, v in component.state_dict().items()}
            state[name, "modes"] = [m.training for m in component.modules()]
            state[name, "grads"] = [p.requires_grad for p in component.parameters()]
            state[name, "hooks"] = [len(m._forward_hooks) for m in component.modules()]
            state[name, "backends"] = [getattr(m, "backend", None) for m in component.modules()]
            state[name, "switches"] = {
                key: value
                for key, value in vars(component).items()
                if isinstance(value, bool | int | float | str)
            }
        else:
            state[name] = repr(component)
            state[name, "attributes"] = {
                key: value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else repr(value)
                for key, value in getattr(component, "__dict__", {}).items()
                if not key.startswith("_tokenizer")
            }
    return state


def assert_same(first, second) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values()):
            assert value.keys() == second[key].keys()
            for name, tensor in value.items():
                assert torch.equal(tensor, second[key][name]), (key, name)
        else:
            assert value == second[key], key


class PipelineContract:
    """Inherit, and define ``build`` and ``inputs``."""

    #: Tolerance of one item alone against the same item in a batch: rounding of other matmul shapes.
    batch_tolerance = 2e-4

    def build(self):
        """A fresh tiny pipeline, the same weights every time."""
        raise NotImplementedError

    def inputs(self, count: int) -> dict:
        """Arguments of a call that makes ``count`` different videos, without ``generator``."""
        raise NotImplementedError

    def only(self, inputs: dict, index: int) -> dict:
        """The inputs of one of the videos."""
        raise NotImplementedError

    @pytest.fixture
    def pipe(self):
        return self.build()

    def video(self, pipe, count: int = 1, **options) -> torch.Tensor:
        options = {"output_type": "pt", "generator": 3, **options}
        return pipe(**self.inputs(count), **options).frames

    # -- results ------------------------------------------------------------------------------

    def test_dict_and_tuple_hold_the_same(self, pipe):
        inputs = self.inputs(1)
        output = pipe(**inputs, generator=1, output_type="pt")
        (frames,) = pipe(**inputs, generator=1, output_type="pt", return_dict=False)
        assert isinstance(output, VideoOutput)
        assert torch.equal(output.frames, frames) and output[0] is output["frames"]
        report = json.loads(json.dumps(output.to_dict()))
        assert report["shape"] == list(frames.shape)
        assert np.shape(report["times"]) == frames.shape[:2]

    def test_output_types_show_the_same_pictures(self, pipe):
        outputs = {kind: self.video(pipe, 2, output_type=kind) for kind in OUTPUT_TYPES}
        tensor, array, images = outputs["pt"], outputs["np"], outputs["pil"]
        assert 0 <= tensor.min() and tensor.max() <= 1 and tensor.std() > 0.01
        np.testing.assert_array_equal(tensor.movedim(2, -1).numpy(), array)
        stacked = np.stack([[np.asarray(image) for image in video] for video in images])
        np.testing.assert_allclose(stacked / 255, array, atol=0.5 / 255 + 1e-6)
        with torch.no_grad():
            decoded = pipe.decode(outputs["latent"])
        torch.testing.assert_close(
            (decoded.transpose(1, 2) / 2 + 0.5).clamp(0, 1), tensor, atol=1e-6, rtol=0
        )
        with pytest.raises(ValueError, match="output_type must be one of"):
            self.video(pipe, output_type="mp4")

    def test_clips_carry_times_and_rate(self, pipe):
        for kind in ("pil", "np", "pt"):
            output = pipe(**self.inputs(2), generator=1, output_type=kind)
            for index, clip in enumerate(output.clips()):
                assert clip.frames.shape[-1] == 3 and clip.fps == output.fps[index]
                assert torch.equal(clip.times, output.times[index])
                assert torch.allclose(clip.times.diff(), torch.tensor(1 / clip.fps).double())
        with pytest.raises(ValueError, match="latents are no pictures"):
            pipe(**self.inputs(1), generator=1, output_type="latent").clips()

    # -- seeds and batches ----------------------------------------------------------------------

    @pytest.mark.parametrize("kind", ["integer", "generator", "list"])
    def test_the_same_seed_the_same_video(self, pipe, kind):
        def generator(seed):
            if kind == "integer":
                return seed
            made = torch.Generator().manual_seed(seed)
            return made if kind == "generator" else [made]

        first, again, other = (self.video(pipe, generator=generator(s)) for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.allclose(first, other, atol=1e-3)

    def test_torch_manual_seed_counts_when_no_generator_is_given(self, pipe):
        torch.manual_seed(5)
        first = self.video(pipe, generator=None)
        torch.manual_seed(5)
        assert torch.equal(first, self.video(pipe, generator=None))

    def test_an_item_alone_equals_itself_in_a_batch(self, pipe):
        inputs = self.inputs(3)
        together = pipe(**inputs, generator=[4, 5, 6], output_type="pt").frames
        assert not torch.allclose(together[0], together[1], atol=1e-3)
        for index in range(3):
            alone = pipe(**self.only(inputs, index), generator=[4 + index], output_type="pt").frames
            torch.testing.assert_close(
                together[index : index + 1], alone, atol=self.batch_tolerance, rtol=0
            )

    def test_videos_per_prompt_follow_their_prompt(self, pipe):
        inputs = self.inputs(2)
        four = pipe(**inputs, num_videos_per_prompt=2, generator=[1, 2, 3, 4], output_type="pt")
        one = pipe(**self.only(inputs, 1), generator=[3], output_type="pt")
        assert len(four.frames) == 4
        torch.testing.assert_close(four.frames[2:3], one.frames, atol=self.batch_tolerance, rtol=0)

    # -- components -----------------------------------------------------------------------------

    def test_a_call_changes_no_component(self, pipe):
        before = state_of(pipe)
        pipe.enable_vae_tiling()
        self.video(pipe, 2, attention_backend="math")
        assert_same(before, state_of(pipe))
        with pytest.raises(KeyboardInterrupt):
            self.video(pipe, attention_backend="math", callback_on_step_end=self._stop_hard)
        assert_same(before, state_of(pipe))

    @staticmethod
    def _stop_hard(*_):
        raise KeyboardInterrupt

    def test_saved_and_loaded_makes_the_same(self, pipe, tmp_path):
        expected = self.video(pipe)
        pipe.save_pretrained(tmp_path / "folder")
        names = {item.name for item in (tmp_path / "folder").iterdir()}
        assert "model_index.json" in names and not any(name.startswith(".") for name in names)
        loaded = type(pipe).from_pretrained(tmp_path / "folder")
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(self.video(loaded), expected)
        # Compare what is written: in memory, tuples stand for lists.
        kept, read = (json.loads(item.to_json_string()) for item in (pipe, loaded))
        assert {**kept, "_name_or_path": None} == {**read, "_name_or_path": None}

    def test_a_folder_names_our_classes_by_the_package_alone(self, pipe, tmp_path):
        expected = self.video(pipe)
        pipe.save_pretrained(tmp_path)
        path = tmp_path / "model_index.json"
        index = json.loads(path.read_text())
        ours = {}
        for name, component in pipe.components.items():
            module = type(component).__module__
            if module.startswith("stvision."):
                ours[name] = [module, type(component).__name__]
                assert index[name] == ["stvision", type(component).__name__]
        assert ours
        # Folders that name the module instead, as diffusers does by itself, load as well.
        path.write_text(json.dumps({**index, **ours}))
        loaded = type(pipe).from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(self.video(loaded), expected)
        loaded.save_pretrained(tmp_path)
        assert {**json.loads(path.read_text()), "_name_or_path": None} == {
            **index, "_name_or_path": None,
        }  # fmt: skip

    def test_diffusers_finds_the_class_of_a_saved_folder(self, pipe, tmp_path):
        expected = self.video(pipe)
        pipe.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(
            str(tmp_path), custom_pipeline="pipeline", trust_remote_code=True
        )
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(self.video(loaded), expected)

    def test_saving_twice_replaces_the_folder(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        names = {item.name for item in tmp_path.iterdir()}
        pipe.save_pretrained(tmp_path)
        assert {item.name for item in tmp_path.iterdir()} == names

    def test_saved_in_half_precision_loads_in_either(self, pipe, tmp_path):
        pipe.to(torch.float16).save_pretrained(tmp_path)
        kind = type(pipe)
        assert kind.from_pretrained(tmp_path, dtype=torch.float16).dtype == torch.float16
        assert kind.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
        assert kind.from_pretrained(tmp_path).dtype == torch.float32

    def test_the_older_name_of_dtype_works_without_a_warning(self, pipe, tmp_path, recwarn, caplog):
        pipe.save_pretrained(tmp_path)
        kind = type(pipe)
        for name in ("dtype", "torch_dtype"):
            assert kind.from_pretrained(tmp_path, **{name: torch.bfloat16}).dtype == torch.bfloat16
        said = [str(item.message) for item in recwarn] + caplog.messages
        assert not [text for text in said if "torch_dtype" in text]
        with pytest.raises(ValueError, match="give only dtype"):
            kind.from_pretrained(tmp_path, dtype=torch.float32, torch_dtype=torch.float32)

    def test_nothing_asks_the_network(self, pipe, tmp_path, monkeypatch):
        def refuse(*_, **__):
            raise AssertionError("the network was asked")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        pipe.save_pretrained(tmp_path)
        loaded = type(pipe).from_pretrained(tmp_path, local_files_only=True)
        loaded.set_progress_bar_config(disable=True)
        self.video(loaded)

    def test_a_path_to_nowhere_is_one_sentence(self, pipe, tmp_path):
        with pytest.raises(FileNotFoundError, match="no pipeline folder at"):
            type(pipe).from_pretrained(tmp_path / "absent")
        with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
            type(pipe).from_pretrained(tmp_path)

    # -- precision and memory ---------------------------------------------------------------------

    def test_bfloat16_is_near_float32(self, pipe):
        exact = self.video(pipe)
        rough = self.video(pipe.to(torch.bfloat16))
        assert rough.dtype == torch.float32
        # Eight bits of mantissa through some dozen layers and three steps.
        assert (rough - exact).abs().mean() < 0.02

    def test_offload_does_nothing_without_an_accelerator(self, pipe):
        if torch.accelerator.is_available():
            pytest.skip("this machine has an accelerator")
        expected = self.video(pipe)
        pipe.enable_model_cpu_offload()
        pipe.enable_sequential_cpu_offload()
        assert torch.equal(self.video(pipe), expected)
        assert pipe.device.type == "cpu"

    def test_vae_chunks_do_not_show(self, pipe):
        plain = self.video(pipe, 2)
        # One chunk takes the plain path, bit for bit.
        pipe.vae_chunk = 10_000
        assert torch.equal(self.video(pipe, 2), plain)
        for chunk in (1, 3):
            pipe.vae_chunk = chunk
            torch.testing.assert_close(self.video(pipe, 2), plain, atol=1e-4, rtol=0)
        pipe.vae_chunk = 0
        with pytest.raises(ValueError, match="vae_chunk must be at least 1"):
            self.video(pipe)

    def test_memory_budgets(self, pipe, capsys):
        expected = self.video(pipe)
        roomy = pipe.fit_memory("64GB", device="cpu")
        assert roomy.vae_chunk is None and roomy.batch_guidance and roomy.offload == "none"
        assert roomy.dtype == torch.float32 and "needed" in capsys.readouterr().out
        assert torch.equal(self.video(pipe), expected)
        assert "peak memory" in capsys.readouterr().out

        tight = pipe.fit_memory(
            roomy.peak_bytes - 1, device="cpu", keep_precision=True, verbose=False
        )
        assert tight.peak_bytes < roomy.peak_bytes
        assert (tight.vae_chunk, tight.batch_guidance) != (None, True)
        torch.testing.assert_close(self.video(pipe), expected, atol=self.batch_tolerance, rtol=0)
        assert capsys.readouterr().out == ""
        json.dumps(tight.to_dict())

        before = (pipe.vae_chunk, pipe.batch_guidance, pipe.dtype)
        with pytest.raises(ValueError, match="most frugal settings need about"):
            pipe.fit_memory(1000, device="cpu")
        assert (pipe.vae_chunk, pipe.batch_guidance, pipe.dtype) == before
        halved = pipe.fit_memory(int(tight.peak_bytes * 0.7), device="cpu", verbose=False)
        assert halved.dtype == torch.bfloat16 == pipe.dtype

    # -- fast mode --------------------------------------------------------------------------------

    def test_fast_mode_needs_a_cuda_device(self, pipe):
        with pytest.raises(
            RuntimeError, match="needs the pipeline on a CUDA device; it is on 'cpu'"
        ):
            pipe.enable_fast()
        assert not pipe.is_fast
        pipe.disable_fast()  # nothing to do

    def test_fast_mode_and_offload_exclude_each_other(self, pipe, monkeypatch):
        layer = next(pipe._denoiser.children())
        layer._hf_hook = object()
        with pytest.raises(RuntimeError, match="fast mode and CPU offload exclude each other"):
            pipe.enable_fast()
        del layer._hf_hook
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        expected = self.video(pipe)
        enable_fast(pipe._denoiser)
        assert pipe.is_fast
        for switch in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
            with pytest.raises(RuntimeError, match=r"call disable_fast\(\) first"):
                switch(device="cpu")
        # What lies on the CPU takes the plain pass meanwhile.
        assert torch.equal(self.video(pipe), expected)
        pipe.disable_fast()
        assert not pipe.is_fast

    @pytest.mark.gpu
    def test_fast_mode_shows_the_same_video(self, pipe):
        pipe.to("cuda")
        plain = [self.video(pipe, generator=seed, num_inference_steps=3) for seed in (1, 2)]
        written_out = self.video(pipe, generator=1, num_inference_steps=3, attention_backend="math")
        pipe.enable_fast()
        for seed, expected in zip((1, 2), plain, strict=True):
            replayed = self.video(pipe, generator=seed, num_inference_steps=3)
            torch.testing.assert_close(replayed, expected, atol=2e-5, rtol=0)
        forward = pipe._denoiser.forward
        self.video(pipe, generator=5, num_inference_steps=7)
        assert len(forward._captures) == 1, "other seeds and step counts replay the same capture"
        other = self.video(pipe, generator=1, num_inference_steps=3, attention_backend="math")
        assert len(forward._captures) == 2
        torch.testing.assert_close(other, written_out, atol=2e-5, rtol=0)
        pipe.to(torch.bfloat16)
        rough = self.video(pipe, generator=1, num_inference_steps=3)
        pipe.disable_fast()
        torch.testing.assert_close(
            rough, self.video(pipe, generator=1, num_inference_steps=3), atol=2e-2, rtol=0
        )

    # -- callbacks ------------------------------------------------------------------------------

    def test_callback_sees_every_step_and_may_replace_latents(self, pipe):
        seen = []

        def callback(pipeline, step, timestep, tensors):
            assert pipeline is pipe and set(tensors) == {"latents"}
            seen.append((step, float(timestep)))
            return {"latents": torch.zeros_like(tensors["latents"])} if len(seen) == 3 else {}

        latents = self.video(pipe, callback_on_step_end=callback, output_type="latent")
        assert [step for step, _ in seen] == list(range(pipe.num_timesteps))
        assert seen == sorted(seen, key=lambda item: -item[1])
        assert (latents == 0).any()
        with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs may name"):
            self.video(
                pipe,
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=["noise"],
            )

    def test_callback_is_given_what_it_names(self, pipe):
        names = list(pipe._callback_tensor_inputs)
        given = []

        def callback(pipeline, step, timestep, tensors):
            given.append(set(tensors))
            return {}

        self.video(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
        assert given[0] == set(names)

    def test_interrupt_stops_and_says_so(self, pipe):
        steps = []

        def callback(pipeline, step, timestep, tensors):
            steps.append(step)
            pipeline.interrupt = True
            return {}

        output = pipe(**self.inputs(1), generator=1, callback_on_step_end=callback)
        assert steps == [0] and output.interrupted and pipe.num_timesteps == 1
        again = pipe(**self.inputs(1), generator=1)
        assert not again.interrupted

    def test_progress_counts_the_steps(self, pipe, capsys):
        pipe.set_progress_bar_config(disable=False)
        self.video(pipe)
        steps = pipe.num_timesteps
        assert f"{steps}/{steps}" in capsys.readouterr().err

    # -- bad input --------------------------------------------------------------------------------

    def test_sizes_are_refused_before_any_network_runs(self, pipe, monkeypatch):
        def refuse(*_, **__):
            raise AssertionError("a network ran")

        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                monkeypatch.setattr(type(component), "forward", refuse)
        multiple = pipe.rules.multiple
        wrong = 3 * multiple + 1
        with pytest.raises(ValueError, match=f"height.*{wrong}.*{3 * multiple} or {4 * multiple}"):
            self.video(pipe, height=wrong, width=2 * multiple)
        with pytest.raises(ValueError, match=f"width.*{wrong}"):
            self.video(pipe, height=2 * multiple, width=wrong)
        for name in ("num_frames", "num_inference_steps", "num_videos_per_prompt"):
            with pytest.raises(ValueError, match=f"{name} .*got 0"):
                self.video(pipe, **{name: 0})

    def test_two_shapes_of_frame_never_mix_up_height_and_width(self, pipe):
        multiple = pipe.rules.multiple
        frames = self.video(pipe, height=5 * multiple, width=3 * multiple)
        assert frames.shape[-2:] == (5 * multiple, 3 * multiple)
