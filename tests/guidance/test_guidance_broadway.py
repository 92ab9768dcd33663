"""BroadWay on tiny random video U-Nets: what is hooked, when, and that nothing stays."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    HeunDiscreteScheduler,
    I2VGenXLUNet,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from diffusers.models.attention import FreeNoiseTransformerBlock
from support_diffusers import tiny_unet_3d
from support_guidance import TinyPipeline, assert_same, snapshot, tiny_motion_unet
from support_seer import tiny_seer_pipeline

from stvision.attention.volume import VolumeAttention
from stvision.guidance import (
    PRESETS,
    BroadWay,
    disable_broadway,
    enable_broadway,
    high_band,
    measure_energy,
)
from stvision.guidance.steps import StepCounter

ALL = BroadWay(fraction=1)
NEUTRAL = BroadWay(alpha=0, beta=1, fraction=1)


@pytest.fixture(scope="module")
def pipe():
    return TinyPipeline(tiny_motion_unet())


def test_guides_the_first_fifth_and_leaves_the_model_as_it_was(pipe):
    pipe.scheduler.set_timesteps(6)
    before = snapshot(pipe)
    plain = pipe(steps=6)
    with BroadWay().applied_to(pipe) as run:
        guided = pipe(steps=6)
        again = pipe(steps=6)
    assert_same(before, snapshot(pipe))
    assert torch.equal(pipe(steps=6), plain)
    assert torch.equal(guided, again)  # state begins anew with every run
    assert (guided - plain).abs().max() > 1e-3
    # ceil(0.2 * 6) = 2 steps of 2 blocks x 2 modules x 2 attentions, two runs
    assert run.calls == 12
    assert [(r.run, r.step) for r in run.records] == [
        (i, step) for i in (0, 1) for step in (0, 1) for _ in range(8)
    ]
    names = [r.module for r in run.records[:8]]
    assert len(set(names)) == 8 and all(n.startswith(("up_blocks.1", "up_blocks.2")) for n in names)


def test_an_exception_leaves_the_model_as_it_was(pipe):
    pipe.scheduler.set_timesteps(5)
    before, plain = snapshot(pipe), pipe()
    with pytest.raises(KeyboardInterrupt), ALL.applied_to(pipe):
        pipe(fail_at=2)
    assert_same(before, snapshot(pipe))
    assert torch.equal(pipe(), plain)


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_no_guidance_is_the_plain_model_and_energy_never_falls(pipe, frames):
    plain = pipe(frames=frames)
    with measure_energy(pipe) as run:
        neutral = pipe(frames=frames)
    torch.testing.assert_close(neutral, plain, rtol=0, atol=1e-5)
    assert len(run.records) == 5 * 8
    with BroadWay(alpha=0.6, beta=1.01, fraction=1).applied_to(pipe) as run:
        pipe(frames=frames)
    for record in run.records:
        assert record.after >= record.before * (1 - 1e-5)


@torch.no_grad()
def written_out(module, hidden, reference, batch, options, first):
    """The method in float64 with torch's transforms, on the tokens of one attention."""
    q, k, v = (
        to(hidden.double()).unflatten(-1, (module.heads, -1)).transpose(1, 2)
        for to in (module.to_q, module.to_k, module.to_v)
    )
    maps = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    maps = maps.unflatten(0, (batch, -1))
    frames = maps.shape[-1]
    videos = batch - first
    energy = maps[first:].square().sum(-1).flatten(1).mean(1)
    guided = maps if reference is None else maps + options.alpha * (reference - maps)
    spectrum = torch.fft.fft(guided)
    band = high_band(frames, options.tau)
    power = spectrum[first:].abs().square() / frames
    high, low = (power[..., part].sum(-1).flatten(1).mean(1) for part in (band, ~band))
    gain = ((energy - low).clamp_min(0) / high).sqrt().clamp_min(options.beta)
    assert gain.min() == options.beta or gain.min() > 1.05 * options.beta
    gain = gain.repeat(batch // videos)[:, None, None, None, None]
    out = torch.fft.ifft(torch.where(band, spectrum * gain, spectrum)).real
    out = out / out.sum(-1, keepdim=True)
    out = (out.flatten(0, 1) @ v).transpose(1, 2).flatten(-2)
    return module.to_out[0](out), maps


@pytest.mark.parametrize("bound", [2**27, 20000])
@pytest.mark.parametrize("beta", [1.3, 0.1])  # the one that is set, and the one that restores
def test_modules_give_the_written_out_formulas(bound, beta):
    """Two attentions of a whole U-Net call, taken apart: reference and guided, B = 4 under CFG."""
    unet = tiny_motion_unet().double()
    pipe = TinyPipeline(unet)
    options = BroadWay(alpha=0.6, beta=beta, tau=1, fraction=1, max_map_bytes=bound)
    seen = {}
    names = [f"up_blocks.{i}.motion_modules.0.transformer_blocks.0.attn1" for i in (1, 2)]

    def keep(name):
        def hook(module, args, out):
            seen.setdefault(name, (args[0], out))

        return hook

    hooks = [unet.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with options.applied_to(pipe):
        pipe(steps=1, batch=2)
    for hook in hooks:
        hook.remove()
    hidden, out = seen[names[0]]
    expected, reference = written_out(unet.get_submodule(names[0]), hidden, None, 4, options, 2)
    torch.testing.assert_close(out, expected)
    # nearest from 4 x 4 to 8 x 8 pixels
    field = reference.unflatten(1, (4, 4))
    field = field.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    hidden, out = seen[names[1]]
    expected, _ = written_out(unet.get_submodule(names[1]), hidden, field, 4, options, 2)
    torch.testing.assert_close(out, expected)


def test_chunks_change_nothing(pipe):
    results = []
    for bound in (2**27, 1):
        for mode in ("nearest", "bilinear"):
            options = BroadWay(fraction=0.4, max_map_bytes=bound, resize=mode)
            with options.applied_to(pipe):
                results.append(pipe(size=(8, 12), batch=2))
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-5)
    torch.testing.assert_close(results[1], results[3], rtol=0, atol=1e-5)
    assert not torch.equal(results[0], results[1])


def test_only_the_conditional_half_is_measured(pipe):
    energies = []
    for batched, guided in ((True, True), (False, True), (False, False)):
        pipe.batched, pipe.guided = batched, guided
        with BroadWay().applied_to(pipe) as run:
            pipe(steps=1)
        energies.append([float(r.before) for r in run.records])
        assert run.calls == (2 if guided and not batched else 1)
        assert {r.step for r in run.records} == {0}
    pipe.batched = pipe.guided = True
    # the first hooked map lies behind no other guided one: equal to the call of the condition alone
    assert energies[0][0] == pytest.approx(energies[2][0], rel=1e-5)
    assert energies[1][8] == pytest.approx(energies[2][0], rel=1e-5)
    assert energies[1][0] != pytest.approx(energies[2][0], rel=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_the_share_is_of_the_steps_that_are_run(pipe, strength):
    with BroadWay(fraction=0.5).applied_to(pipe) as run:
        pipe(steps=10, strength=strength)
    assert run.calls == 10 * strength
    assert len({r.step for r in run.records}) == 5 * strength


def test_a_second_order_scheduler_takes_several_calls_a_step():
    pipe = TinyPipeline(tiny_motion_unet(), HeunDiscreteScheduler(num_train_timesteps=100))
    with BroadWay(fraction=0.5).applied_to(pipe) as run:
        pipe(steps=4)
    assert run.calls == 7
    assert [r.step for r in run.records[::8]] == [0, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32(dtype):
    unet = tiny_motion_unet()
    sample, text = torch.randn(2, 4, 5, 8, 8), torch.randn(10, 3, 8)

    def call(kind):
        model = unet.to(kind)
        with torch.no_grad(), ALL.applied_to(model, num_steps=2) as run:
            out = model(sample.to(kind), 7, encoder_hidden_states=text.to(kind)).sample
        assert run.records[0].before.dtype == torch.float32
        return out

    expected = call(torch.float32)
    out = call(dtype)
    assert out.dtype == dtype
    error = (out.float() - expected).norm() / expected.norm()
    assert error < (0.005 if dtype == torch.float16 else 0.04)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bound", [2**27, 200_000])
def test_half_precision_attention_is_near_float64(device, dtype, bound):
    from stvision.guidance.engine import guide

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 48, 16, 2, 40, generator=generator).to(dtype) for _ in range(3))
    earlier = torch.randn(4, 3, 4, 2, 16, 16, generator=generator).softmax(-1)
    options = BroadWay(alpha=0.6, beta=1.5, max_map_bytes=bound)
    kwargs = {"scale": 0.16, "options": options, "size": (6, 8), "first_conditional": 2}
    with torch.no_grad():
        wide = guide(q.double(), k.double(), v.double(), reference=earlier.double(), **kwargs)
        half = guide(*(x.to(device) for x in (q, k, v)), reference=earlier.to(device), **kwargs)
    for name in ("before", "high", "low", "gain"):
        found = getattr(half.energy, name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found.cpu().double(), getattr(wide.energy, name), rtol=1e-4, atol=1e-6
        )
    error = (half.output.cpu().double() - wide.output).norm() / wide.output.norm()
    assert error < (1e-3 if dtype == torch.float16 else 8e-3), error


def test_gradient_checkpointing_gives_the_same_gradients():
    unet = tiny_motion_unet()
    sample, text = torch.randn(1, 4, 4, 8, 8), torch.randn(4, 3, 8)
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            unet.enable_gradient_checkpointing()
        unet.train().zero_grad()
        with ALL.applied_to(unet, num_steps=1):
            unet(sample, 7, encoder_hidden_states=text).sample.square().sum().backward()
        results.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [UNet3DConditionModel, I2VGenXLUNet])
def test_other_video_unets(kind):
    unet = tiny_unet_3d(kind)
    sample = torch.randn(2, 4, 3, 8, 8)
    kwargs = {"encoder_hidden_states": torch.randn(2, 4, 8)}
    if kind is I2VGenXLUNet:
        kwargs |= {
            "fps": torch.tensor([8, 8]),
            "image_latents": torch.randn(2, 4, 3, 8, 8),
            "image_embeddings": torch.randn(2, 8),
        }

    @torch.no_grad()
    def call():
        return unet(sample, 7, **kwargs).sample

    plain = call()
    with ALL.applied_to(unet, num_steps=1) as run:
        guided = call()
    with NEUTRAL.applied_to(unet, num_steps=1):
        neutral = call()
    assert torch.equal(call(), plain)
    assert (guided - plain).abs().max() > 1e-4
    torch.testing.assert_close(neutral, plain, rtol=0, atol=1e-5)
    assert {r.module.split(".")[2] for r in run.records} == {"temp_attentions"}
    assert len(run.records) == 2 * 2 * 2


def seer_call(pipe, **options):
    frames = torch.rand(2, 2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    result = pipe(["open the door", "close"], frames, generator=[1, 2], output_type="pt", **options)
    return result.frames


def test_seer_pipeline():
    pipe = tiny_seer_pipeline()
    plain, before = seer_call(pipe), snapshot(pipe)
    with BroadWay(fraction=0.5).applied_to(pipe) as run:
        guided = seer_call(pipe)
    assert_same(before, snapshot(pipe))
    assert torch.equal(seer_call(pipe), plain)
    assert (guided - plain).abs().max() > 1e-4
    # every hooked module in each of ceil(0.5 N) steps
    modules = {r.module for r in run.records}
    steps = run.calls
    assert len(run.records) == len(modules) * -(-steps // 2)
    assert all("temporal_attentions" in name for name in modules)
    with NEUTRAL.applied_to(pipe):
        torch.testing.assert_close(seer_call(pipe), plain, rtol=0, atol=1e-4)


def test_seer_weights_that_come_and_go():
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny_seer_pipeline()
    pipe.enable_broadway(fraction=1.0)
    expected = seer_call(pipe)
    accelerate.cpu_offload(pipe.unet, execution_device="cpu")
    assert all(p.device.type == "meta" for p in pipe.unet.parameters())
    before = snapshot(pipe)
    assert torch.equal(seer_call(pipe), expected)
    assert_same(before, snapshot_of_network(pipe, before))


def test_a_video_does_not_depend_on_those_made_with_it():
    pipe = tiny_seer_pipeline()
    pipe.enable_broadway(beta=0.1, fraction=1.0)
    frames = torch.rand(2, 2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    texts = ["open the door", "close"]
    together = pipe(texts, frames, generator=[1, 2], output_type="pt").frames
    gains = [r.gain for r in pipe.broadway_run.records]
    assert any(gain[0] != gain[1] for gain in gains)
    for item in range(2):
        alone = pipe(texts[item], frames[item], generator=1 + item, output_type="pt").frames
        torch.testing.assert_close(alone[0], together[item], rtol=0, atol=1e-5)


def test_seer_pipeline_switched_on_and_off():
    pipe = tiny_seer_pipeline()
    plain, before = seer_call(pipe, num_frames=8), snapshot(pipe)
    with BroadWay.from_preset("videocrafter2", beta=3.0).applied_to(pipe) as run:
        expected = seer_call(pipe, num_frames=8)
    pipe.enable_broadway("videocrafter2", beta=3.0)
    for _ in range(2):  # state of one call: the second begins as the first did
        assert torch.equal(seer_call(pipe, num_frames=8), expected)
        assert_same(before, snapshot_of_network(pipe, before))
        told = [(r.run, r.step, r.module, r.gain.tolist()) for r in pipe.broadway_run.records]
        assert told == [(r.run, r.step, r.module, r.gain.tolist()) for r in run.records]
        assert pipe.broadway_run.calls == run.calls
    assert {r[0] for r in told} == {0, 1}  # windows of the roll-out
    assert not torch.equal(expected, plain)
    # a stream that is left in the middle leaves nothing behind
    frames = torch.rand(2, 16, 16, 3)
    next(iter(pipe.stream("close", frames, num_frames=8, generator=0)))
    assert_same(before, snapshot_of_network(pipe, before))
    pipe.disable_broadway()
    pipe.disable_broadway()
    assert torch.equal(seer_call(pipe, num_frames=8), plain)
    assert pipe.broadway_run is None
    with pytest.raises(TypeError, match="options must be a BroadWay or the name of a preset"):
        pipe.enable_broadway(0.5)
    with pytest.raises(ValueError, match="has no temporal attention in up blocks 7"):
        pipe.enable_broadway(BroadWay(), blocks=(7,))
    assert torch.equal(seer_call(pipe, num_frames=8), plain)


def snapshot_of_network(pipe, like):
    """A snapshot without the pipeline's own attributes, which tell of the switch."""
    return (snapshot(pipe)[0], *like[1:])


class PlainCapture:
    """Stands in for a CUDA graph: computes again what it was made of."""

    def __init__(self, forward, inputs, fixed):
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        self.forward, self.fixed, self.graph, self.replays = forward, fixed, self, 0

    def replay(self):
        self.replays += 1
        values = {**self.inputs, **self.fixed}
        self.output = self.forward.plain(values.pop("sample"), values.pop("timestep"), **values)


@pytest.mark.parametrize("compiled", [False, True])
def test_guided_steps_are_not_replayed_and_captures_stay(monkeypatch, compiled):
    """Fast mode on a machine without a GPU."""
    from stvision.models.fast import GraphedForward

    captures = []

    def capture(self, tensors, fixed, num_args):
        assert num_args == 0
        captures.append(PlainCapture(self, tensors, fixed))
        return captures[-1]

    monkeypatch.setattr(GraphedForward, "_replays", lambda self, sample: not self.paused)
    monkeypatch.setattr(GraphedForward, "_capture", capture)
    pipe = tiny_seer_pipeline(num_inference_steps=5)
    plain = seer_call(pipe)
    options = BroadWay(fraction=0.4)
    with options.applied_to(pipe):
        expected = seer_call(pipe)
    graphed = pipe.unet.forward = GraphedForward(pipe.unet)
    graphed.compiled = compiled
    pipe.enable_broadway(options)
    assert torch.equal(seer_call(pipe), expected)
    assert sum(c.replays for c in captures) == (0 if compiled else 3)
    assert pipe.is_fast and vars(pipe.unet)["forward"] is graphed and not graphed.paused
    pipe.disable_broadway()
    assert torch.equal(seer_call(pipe), plain)
    assert [c.replays for c in captures] == ([5] if compiled else [8])
    # also when an error ends a guided step
    with pytest.raises(ZeroDivisionError), options.applied_to(pipe):
        seer_call(pipe, callback_on_step_end=lambda *args: 1 / 0)
    assert not graphed.paused


@pytest.mark.gpu
@pytest.mark.parametrize("first", ["fast", "broadway"])
def test_fast_mode_and_broadway_on_a_gpu(first):
    pipe = tiny_seer_pipeline().to("cuda")
    plain = seer_call(pipe)
    pipe.enable_broadway()
    expected = seer_call(pipe)
    pipe.disable_broadway()
    for switch in (first, *({"fast", "broadway"} - {first})):
        if switch == "fast":
            pipe.enable_fast()
        else:
            pipe.enable_broadway()
    for _ in range(2):
        torch.testing.assert_close(seer_call(pipe), expected, rtol=0, atol=1e-5)
    captures = vars(pipe.unet)["forward"]._captures
    assert len(captures) == 1  # of the steps without guidance
    pipe.disable_broadway()
    torch.testing.assert_close(seer_call(pipe), plain, rtol=0, atol=1e-5)
    assert pipe.is_fast and len(captures) == 1


def test_seer_stays_causal_under_guidance():
    """A changed later frame changes no earlier one: maps are guided apart from their energies."""
    from stvision.attention import ATTENTIONS
    from stvision.guidance.engine import guide

    torch.manual_seed(0)
    module = ATTENTIONS["seer-window"](8, 2, window_size=2)
    layout = module.layout((4, 4, 4))
    q, k = (torch.randn(1, 4, 16, 2, 4, dtype=torch.float64) for _ in range(2))
    seen = torch.ones(16, 16, dtype=torch.bool).tril()

    def weights(options, reference=None):
        """Maps, by attending to one-hot values."""
        one_hot = torch.eye(16, dtype=torch.float64)[None, None, :, None].expand(1, 4, 16, 2, 16)
        result = guide(
            q, k, one_hot, scale=0.5, options=options, size=(4, 4), layout=layout, causal=True,
            reference=reference, keep=True,
        )  # fmt: skip
        return result.output, result.reference

    plain, own = weights(NEUTRAL)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(2, 3) for x in (q, k)), torch.eye(16, dtype=torch.float64).expand(1, 4, 2, 16, 16),
        is_causal=True, scale=0.5,
    )  # fmt: skip
    torch.testing.assert_close(plain, expected.transpose(2, 3))
    # frame maps of pixels, from the windows written out
    for y in range(4):
        for x in range(4):
            window, offset = y // 2 * 2 + x // 2, y % 2 * 2 + x % 2
            rows = expected[0, window].unflatten(1, (4, 4))[:, :, offset]
            torch.testing.assert_close(own[0, y, x], rows.unflatten(-1, (4, 4)).sum(-1))
    other = torch.rand(1, 2, 2, 2, 4, 4, dtype=torch.float64).tril() + 0.01 * torch.eye(4)
    other = other / other.sum(-1, keepdim=True)
    guided, _ = weights(BroadWay(alpha=0.6, beta=1.5, fraction=1), other)
    assert (guided - plain).abs().max() > 0.05
    assert not guided.transpose(2, 3)[..., ~seen].any()
    rows = guided.sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    # without enhancement and with alpha = 1 the frame maps are the resized reference's
    full, _ = weights(BroadWay(alpha=1, beta=1e-9, tau=0, fraction=1), other)
    assert not full.transpose(2, 3)[..., ~seen].any()


def test_windows_that_do_not_divide_are_refused():
    pipe = tiny_seer_pipeline()
    sites = [m for m in pipe.unet.up_blocks.modules() if isinstance(m, VolumeAttention)]
    for module in sites:
        module.window_size = (3, 3)
    with ALL.applied_to(pipe), pytest.raises(ValueError, match="does not divide"):
        seer_call(pipe)


def test_enable_and_disable():
    pipe = TinyPipeline(tiny_motion_unet())
    pipe.scheduler.set_timesteps(5)
    before, plain = snapshot(pipe), pipe()
    run = enable_broadway(pipe, "videocrafter2")
    assert not torch.equal(pipe(), plain) and run.records
    with pytest.raises(RuntimeError, match="on already"):
        enable_broadway(pipe)
    with pytest.raises(RuntimeError, match="on already"), ALL.applied_to(pipe):
        pass
    pipe.scheduler = DDIMScheduler(num_train_timesteps=100)  # replaced while on
    pipe()
    disable_broadway(pipe)
    disable_broadway(pipe)
    assert torch.equal(pipe(), plain)
    assert_same(before, snapshot(pipe))


def test_refusals():
    image = UNet2DConditionModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, norm_num_groups=2, cross_attention_dim=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="UNet2DConditionModel has no temporal attention"):
        BroadWay().applied_to(image, num_steps=1).__enter__()
    unet = tiny_motion_unet()
    with pytest.raises(ValueError, match="num_steps"):
        BroadWay().applied_to(unet).__enter__()
    with pytest.raises(TypeError, match="no U-Net"):
        BroadWay().applied_to(object()).__enter__()
    with pytest.raises(ValueError, match=r"torch\.compile"):
        BroadWay().applied_to(torch.compile(unet), num_steps=1).__enter__()
    blocks = unet.up_blocks[1].motion_modules[0].transformer_blocks
    blocks[0] = FreeNoiseTransformerBlock(8, 2, 4)
    with pytest.raises(ValueError, match="FreeNoise"):
        BroadWay().applied_to(unet, num_steps=1).__enter__()
    assert not unet._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "value"),
    [("alpha", 1.1), ("beta", 0), ("tau", -1), ("fraction", 2), ("blocks", ()),
     ("resize", "cubic"), ("max_map_bytes", 0)],
)  # fmt: skip
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        BroadWay(**{name: value})


def test_presets_are_the_authors():
    assert (BroadWay.from_preset("animatediff").alpha, PRESETS["videocrafter2"]["beta"]) == (
        0.6,
        10,
    )
    assert [BroadWay().guided_steps(n) for n in (1, 5, 25, 26)] == [1, 1, 5, 6]
    with pytest.raises(ValueError, match="preset"):
        BroadWay.from_preset("wan")


def test_steps_are_told_without_reading_the_timesteps(monkeypatch) -> None:
    timesteps = torch.tensor([951, 901, 401, 1])
    counter = StepCounter()
    counter.start(timesteps)
    copied = timesteps[2].clone()

    def refuse(*_: object) -> None:
        raise AssertionError("a timestep was read back from its device")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "flatten", refuse)
        patch.setattr(torch.Tensor, "__float__", refuse)
        for index, timestep in enumerate(timesteps[1:]):  # as pipelines hand them on: views
            assert counter.advance(timestep.expand(3)) is True
            assert not counter.advance(timestep)
            assert (counter.index, counter.total) == (index, 3)
    counter.start(timesteps)
    assert counter.advance(copied) and counter.total == 2  # another tensor is read
