"""BroadWay / ByTheWay: steadier structure and more motion from a video U-Net, without training.

Bu et al. (CVPR 2025). In the first steps of sampling the maps of temporal self-attention in the up
blocks are drawn towards those of an early block (Temporal Self-Guidance) and the high band of their
spectrum along key frames is amplified (Fourier Motion Enhancement); see
:mod:`stvision.guidance.maps` for the formulas and :mod:`stvision.guidance.volume_maps` for their
form on maps over frames and space, as Seer has them.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stvision.attention.volume import VolumeAttention
from stvision.attention.windows import WindowLayout
from stvision.guidance.engine import ModuleEnergy, guide
from stvision.guidance.maps import Resizing
from stvision.guidance.sites import Site, check_chunking, check_compiled, find_sites
from stvision.guidance.steps import StepCounter, WatchedSetTimesteps
from stvision.models.fast import GraphedForward

#: the authors' settings: keyword arguments of :class:`BroadWay`
PRESETS: dict[str, dict[str, float]] = {
    "animatediff": {"alpha": 0.6, "beta": 1.5, "tau": 7},
    "videocrafter2": {"alpha": 0.1, "beta": 10.0, "tau": 7},
}

_HANDLE = "_broadway_handle"


@dataclass
class BroadWayRun:
    """What happened while guidance was on.

    Args:
        records: one for each hooked module and guided U-Net call, in order of evaluation.
        calls: U-Net calls seen, guided or not.
    """

    records: list[ModuleEnergy] = field(default_factory=list)
    calls: int = 0


@dataclass(frozen=True, kw_only=True)
class BroadWay:
    """Options of the method; holds no model and no state.

    Args:
        alpha: strength of self-guidance, 0 (off) to 1 (the reference's map).
        beta: smallest gain of the high band, above 0; the gain that restores a map's energy is
            used where it is larger.
        tau: half width of the high band in bins; F/2 or more for all but the constant.
        fraction: share of the sampling steps, from the first on, rounded up.
        blocks: up blocks; those that a U-Net has not are passed over. The first that has temporal
            attention is the reference of self-guidance.
        clamp: set negative weights to zero before rows are renormalised, as in the first version
            of the method (BroadWay) and not in the later one (ByTheWay).
        resize: how reference maps are brought to a block's resolution: "nearest" or "bilinear"
            (the papers do not say). Where the head counts of two blocks differ, heads have no
            counterpart and the reference's mean over its heads is taken.
        max_map_bytes: bound on the memory of maps in flight; larger fields go in chunks of pixels
            and are computed twice, once for the energies and once for the result. The reference's
            own maps are kept beside it during a step.
    """

    alpha: float = 0.6
    beta: float = 1.5
    tau: float = 7
    fraction: float = 0.2
    blocks: tuple[int, ...] = (1, 2, 3)
    clamp: bool = False
    resize: Resizing = "nearest"
    max_map_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, got {self.alpha}")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be above 0 and finite, got {self.beta}")
        if not self.tau >= 0:
            raise ValueError(f"tau must be 0 or more, got {self.tau}")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction must be between 0 and 1, got {self.fraction}")
        blocks = tuple(sorted(set(self.blocks)))
        if not blocks or blocks[0] < 0:
            raise ValueError(f"blocks must name up blocks from 0 on, got {self.blocks}")
        object.__setattr__(self, "blocks", blocks)
        if self.resize not in ("nearest", "bilinear"):
            raise ValueError(f"resize must be 'nearest' or 'bilinear', got {self.resize!r}")
        if self.max_map_bytes < 1:
            raise ValueError(f"max_map_bytes must be at least 1, got {self.max_map_bytes}")

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "BroadWay":
        """The authors' setting for "animatediff" or "videocrafter2", with changes."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}, got {name!r}")
        options: dict[str, Any] = {**PRESETS[name], **changes}
        return cls(**options)

    def guided_steps(self, num_steps: int) -> int:
        """How many of ``num_steps`` are guided: ceil(fraction · num_steps)."""
        return math.ceil(self.fraction * num_steps - 1e-9)

    def check(self, model: Any) -> list[Site]:
        """The temporal attentions of a pipeline or U-Net that would be guided.

        Raises:
            ValueError: no temporal attention, FreeNoise or torch.compile is on.
            TypeError: the model has no U-Net.
            RuntimeError: guidance is on already.
        """
        pipeline = None if isinstance(model, nn.Module) else model
        unet = getattr(model, "unet", None) if pipeline is not None else model
        if not isinstance(unet, nn.Module):
            raise TypeError(
                f"{type(model).__name__} has no U-Net; BroadWay needs a video pipeline with "
                "'unet' and 'scheduler', or a video U-Net"
            )
        check_compiled(unet)
        check_chunking(unet, pipeline)
        sites = find_sites(unet, self.blocks)
        if any(isinstance(vars(s.module).get("mix"), _Mix) for s in sites) or any(
            isinstance(getattr(s.module, "processor", None), _Processor) for s in sites
        ):
            raise RuntimeError("BroadWay is on already; disable it before enabling it anew")
        return sites

    @contextmanager
    def applied_to(
        self,
        model: Any,
        *,
        num_steps: int | None = None,
        record: BroadWayRun | None = None,
    ) -> Iterator[BroadWayRun]:
        """Guide ``model`` inside the ``with`` block; leave it as it was found.

        State begins anew with every sampling run. Under classifier-free guidance as one batch
        (unconditional half first, told by its equal halves of latents) energies are the
        conditional half's, of each video by itself; where the halves are evaluated by one call each, every call has its
        own. Gradients see energies and reference maps as constants.

        Args:
            model: a pipeline with ``unet`` and ``scheduler``, or a U-Net.
            num_steps: steps of a sampling run; needed for, and only for, a U-Net by itself.
            record: an earlier record to continue.

        Yields:
            Record of what is done.

        Raises:
            ValueError: no temporal attention, FreeNoise or torch.compile is on, or ``num_steps``
                missing or out of place.
            TypeError: the model has no U-Net.
            RuntimeError: guidance is on already.
        """
        pipeline = None if isinstance(model, nn.Module) else model
        sites = self.check(model)
        unet: nn.Module = model if pipeline is None else pipeline.unet
        scheduler = getattr(model, "scheduler", None)
        if pipeline is None and (num_steps is None or num_steps < 1):
            raise ValueError(f"a U-Net by itself needs num_steps of at least 1, got {num_steps}")
        if pipeline is not None and num_steps is not None:
            raise ValueError("num_steps is the pipeline's own; give it for a U-Net by itself only")

        run = BroadWayRun() if record is None else record
        counter = StepCounter(
            lambda: getattr(getattr(pipeline, "scheduler", None), "timesteps", None), num_steps
        )
        session = _Session(self, unet, pipeline, counter, run, min(s.block for s in sites))
        session.first_run = run.records[-1].run + 1 if run.records else 0
        with ExitStack() as stack:
            stack.callback(session.forget)
            if scheduler is not None and "set_timesteps" not in vars(scheduler):
                scheduler.set_timesteps = WatchedSetTimesteps(scheduler, counter)
                stack.callback(vars(scheduler).pop, "set_timesteps", None)
            hook = unet.register_forward_pre_hook(session.before_call, with_kwargs=True)
            stack.callback(hook.remove)
            for site in sites:
                _hook_site(stack, session, site)
            yield run


@dataclass
class _Session:
    """State of guidance while it is on."""

    options: BroadWay
    unet: nn.Module
    pipeline: Any
    counter: StepCounter
    run: BroadWayRun
    reference_block: int
    active: bool = False
    #: whether batches of this sampling run have two halves; asked once, since it waits for a GPU
    halved: bool | None = None
    batch: int = 1
    first_conditional: int = 0
    first_run: int = 0
    references: dict[str, Tensor] = field(default_factory=dict)

    def forget(self) -> None:
        self.active = False
        self.references.clear()
        self._pause(False)

    def _pause(self, guided: bool) -> None:
        """Let fast mode rest: its captures hold the attention that guidance replaces."""
        forward = vars(self.unet).get("forward")
        if isinstance(forward, GraphedForward):
            forward.paused = guided

    def before_call(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.references.clear()
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        if self.counter.advance(timestep) and self.counter.index == 0:
            check_compiled(self.unet)
            check_chunking(self.unet, self.pipeline)
            self.halved = None
        self.run.calls += 1
        self.active = self.counter.index < self.options.guided_steps(self.counter.total)
        # a compiled network would be compiled anew for the stand-ins, even in steps without guidance
        forward = vars(self.unet).get("forward")
        self._pause(self.active or getattr(forward, "compiled", False))
        if self.active:
            if self.halved is None or self.batch != sample.shape[0]:
                self.halved = self._is_guided(sample)
            self.batch = sample.shape[0]
            self.first_conditional = self.batch // 2 if self.halved else 0

    def _is_guided(self, sample: Tensor) -> bool:
        """Whether the batch holds an unconditional half before the conditional one."""
        if sample.shape[0] % 2:
            return False
        if getattr(self.pipeline, "do_classifier_free_guidance", None) is False:
            return False
        first, second = sample.chunk(2)
        return torch.equal(first, second)

    def attend(
        self,
        site: Site,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        size: tuple[int, int],
        scale: float,
        layout: WindowLayout | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Guided attention, (B, pixels or windows, L, heads, d) to the same."""
        is_reference = site.block == self.reference_block
        result = guide(
            query,
            key,
            value,
            scale=scale,
            options=self.options,
            size=size,
            layout=layout,
            causal=causal,
            first_conditional=self.first_conditional,
            reference=None if is_reference else self.references.get(site.place),
            keep=is_reference and self.options.alpha > 0,
        )
        if result.reference is not None:
            self.references[site.place] = result.reference
        energy = result.energy
        number = self.first_run + self.counter.runs - 1
        self.run.records.append(
            replace(energy, module=site.name, step=self.counter.index, run=number)
        )
        return result.output


def _hook_site(stack: ExitStack, session: _Session, site: Site) -> None:
    module: Any = site.module
    if isinstance(module, VolumeAttention):
        for name, stand_in in (
            ("mix", _Mix(session, site)),
            ("attend_ragged", _Ragged(session, site)),
        ):
            if name in vars(module):
                raise RuntimeError(f"{site.name}.{name} has been replaced already")
            setattr(module, name, stand_in)
            stack.callback(vars(module).pop, name, None)
        return
    size = _FieldSize()
    hook = site.parent.register_forward_pre_hook(size, with_kwargs=True)
    stack.callback(hook.remove)
    original = module.processor
    module.set_processor(_Processor(session, site, original, size))
    stack.callback(module.set_processor, original)


class _FieldSize:
    """Notes the rows and columns that a temporal transformer is called with."""

    size = (1, 1)

    def __call__(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.size = (hidden.shape[-2], hidden.shape[-1])


class _Processor:
    """Attention processor that guides in active steps and else leaves all to the original."""

    def __init__(self, session: _Session, site: Site, original: Any, size: _FieldSize) -> None:
        self.session = session
        self.site = site
        self.original = original
        self.field = size

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if not self.session.active or encoder_hidden_states is not None:
            return self.original(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                temb=temb,
            )
        if attention_mask is not None or attn.spatial_norm is not None:
            raise ValueError(f"{self.site.name} attends under a mask, which BroadWay does not take")
        residual = hidden_states
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        # (B·h·w, F, heads, d) -> (B, h·w, F, heads, d)
        query, key, value = (x.unflatten(0, (self.session.batch, -1)) for x in (query, key, value))
        out = self.session.attend(self.site, query, key, value, self.field.size, attn.scale)
        out = attn.to_out[1](attn.to_out[0](out.flatten(0, 1).flatten(-2)))
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


class _Mix:
    """Stands in for ``VolumeAttention.mix``."""

    def __init__(self, session: _Session, site: Site) -> None:
        self.session = session
        self.site = site

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: WindowLayout) -> Tensor:
        module: Any = self.site.module
        if not self.session.active:
            return VolumeAttention.mix(module, query, key, value, layout)
        query, key, value = (x.unflatten(0, (self.session.batch, -1)) for x in (query, key, value))
        out = self.session.attend(
            self.site,
            query,
            key,
            value,
            (layout.grid[1], layout.grid[2]),
            query.shape[-1] ** -0.5,
            layout,
            module.causal,
        )
        return out.flatten(0, 1)


class _Ragged:
    """Stands in for ``VolumeAttention.attend_ragged``: windows of several sizes in one map."""

    def __init__(self, session: _Session, site: Site) -> None:
        self.session = session
        self.site = site

    def __call__(self, x: Tensor) -> Tensor:
        module: Any = self.site.module
        if self.session.active:
            height, width = x.shape[2:4]
            raise ValueError(
                f"{self.site.name} has a map of {height} x {width}, which its window "
                f"{module.window(height, width)} does not divide; BroadWay needs whole windows: "
                "choose another height and width"
            )
        return VolumeAttention.attend_ragged(module, x)


def enable_broadway(pipe: Any, options: BroadWay | str = "animatediff") -> BroadWayRun:
    """Guide every call of ``pipe`` from now on, until :func:`disable_broadway`.

    Args:
        pipe: a video pipeline.
        options: options, or the name of a preset.

    Returns:
        Record of what is done, growing with every call.

    Raises:
        ValueError, RuntimeError: see :meth:`BroadWay.applied_to`.
    """
    if _HANDLE in vars(pipe):
        raise RuntimeError("BroadWay is on already; disable it before enabling it anew")
    chosen = BroadWay.from_preset(options) if isinstance(options, str) else options
    stack = ExitStack()
    run = stack.enter_context(chosen.applied_to(pipe))
    vars(pipe)[_HANDLE] = stack
    return run


def disable_broadway(pipe: Any) -> None:
    """End :func:`enable_broadway`; nothing happens when it is not on."""
    stack = vars(pipe).pop(_HANDLE, None)
    if stack is not None:
        stack.close()


@contextmanager
def measure_energy(
    model: Any, *, fraction: float = 1.0, num_steps: int | None = None
) -> Iterator[BroadWayRun]:
    """Record the energies of temporal attention maps without changing them (but for rounding).

    Args:
        model: as for :meth:`BroadWay.applied_to`.
        fraction: share of the steps, from the first on.
        num_steps: as there.
    """
    options = BroadWay(alpha=0, beta=1, fraction=fraction)
    with options.applied_to(model, num_steps=num_steps) as run:
        yield run
