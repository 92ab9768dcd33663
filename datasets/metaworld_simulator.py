"""Plays Meta-World tasks with their scripted policies and makes pictures of what happened.

Physics first, pictures after: an episode is played to its end while what a picture depends on is
kept for every step, and only the wanted steps are drawn. Nothing here touches ``mujoco`` before a
:class:`Simulator` is made.
"""

import os
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stvision.datasets.metaworld_tasks import SCENES, SHARED_SCENES, SharedScene
from stvision.optional import require

#: a metaworld environment sets nothing but these arrays of its model at a reset
_MODEL_ARRAYS = ("body_pos", "body_quat", "geom_pos", "site_pos", "site_rgba")
#: what a picture depends on, apart from the model
_POSE_ARRAYS = ("geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos", "cam_xmat")
#: joints of the arm and of its two fingers, whose coordinates lie side by side
_ARM_JOINTS = (*(f"right_j{i}" for i in range(7)), "r_close", "l_close")

#: goal marks of the tasks that share scenes
_GOAL_SITES = ("goal", "goal_open", "goal_close", "goal_lock", "goal_unlock", "mug_goal")


@dataclass(frozen=True)
class View:
    """A camera that looks at a point.

    Args:
        lookat: that point; x to the robot's right, y away from the robot, z up, metres.
        distance: from the camera to the point, metres.
        azimuth: direction of view in the plane, degrees; 90 looks away from the robot.
        elevation: direction of view against the plane, degrees; negative looks down.
        fovy: vertical angle of view, degrees.
    """

    lookat: tuple[float, float, float]
    distance: float
    azimuth: float
    elevation: float
    fovy: float = 40.0


#: views that frame the working space closely enough for small pictures
VIEWS: dict[str, View] = {
    "workspace": View((0.0, 0.64, 0.14), 0.98, 145.0, -33.0),
    "workspace-left": View((-0.02, 0.65, 0.12), 0.92, 35.0, -33.0),
    "front": View((0.0, 0.65, 0.12), 1.0, 270.0, -30.0),
    "overhead": View((0.0, 0.68, 0.1), 1.15, 90.0, -89.0),
}

#: Meta-World's own cameras; the picture of ``corner`` is turned by 180 degrees, since it stands on
#: its head in the model files
MODEL_CAMERAS: tuple[str, ...] = (
    "corner",
    "corner2",
    "corner3",
    "corner4",
    "topview",
    "behindGripper",
    "gripperPOV",
)


def choose_gl() -> str:
    """Choose MuJoCo's OpenGL platform for this process and the processes that it starts.

    ``MUJOCO_GL`` wins where it is set; else ``egl`` where a GPU's device file is present and
    ``osmesa`` (software) where none is. It has to be called before ``mujoco`` is first imported.

    Returns:
        The name that is now in ``MUJOCO_GL``.
    """
    if not os.environ.get("MUJOCO_GL"):
        gpu = Path("/dev/nvidiactl").exists() or any(Path("/dev/dri").glob("renderD*"))
        os.environ["MUJOCO_GL"] = "egl" if gpu else "osmesa"
    return os.environ["MUJOCO_GL"]


def _no_opengl(error: Exception) -> RuntimeError:
    return RuntimeError(
        f"no OpenGL context with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({error}); set MUJOCO_GL to "
        "egl (GPU driver and libEGL), osmesa (libOSMesa) or glfw (a display)"
    )


def _load_mujoco() -> Any:
    try:
        return require("mujoco", extra="sim")
    except ImportError:
        raise
    except Exception as error:  # the platform's library is absent, and each fails in its own way
        raise _no_opengl(error) from error


@dataclass(frozen=True)
class Settings:
    """What decides how an episode looks; a folder holds episodes of one setting only.

    Args:
        cameras: names out of :data:`VIEWS` and :data:`MODEL_CAMERAS`.
        height: of the pictures, pixels.
        width: of the pictures, pixels.
        num_frames: frames kept of an episode, evenly over its length.
        tail: steps (of 12.5 ms) that an episode goes on after its success.
        max_steps: steps after which an episode without success has failed.
        same_start: let tasks that share a scene begin alike (see
            :class:`~stvision.datasets.metaworld_tasks.SharedScene`).
        crf: quality of the H.264 encoder, 0 to 51; lower is better.
        lossless: keep every value instead (H.264 of RGB, which few browsers play). Small pictures
            gain, since ordinary H.264 stores colour at half the resolution.
    """

    cameras: tuple[str, ...] = ("workspace",)
    height: int = 64
    width: int = 64
    num_frames: int = 16
    tail: int = 16
    max_steps: int = 250
    same_start: bool = True
    crf: int = 12
    lossless: bool = False

    def __post_init__(self) -> None:
        known = (*VIEWS, *MODEL_CAMERAS)
        for camera in self.cameras:
            if camera not in known:
                raise ValueError(f"cameras: {camera!r} is none of {', '.join(known)}")
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise ValueError(f"cameras: need distinct names, got {self.cameras}")
        for name, low in (("height", 16), ("width", 16), ("num_frames", 2), ("max_steps", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.height % 2 or self.width % 2:
            raise ValueError(f"height and width must be even, got {self.height}x{self.width}")
        if self.tail < 0:
            raise ValueError(f"tail must not be negative, got {self.tail}")


@dataclass
class Episode:
    """One played episode, before any picture is made of it.

    Args:
        success: whether the task was solved.
        dt: seconds between two steps.
        poses: per step, what a picture depends on.
        markers: (position, colour) of goal marks that the pictures show in addition.
    """

    success: bool
    dt: float
    poses: list[tuple[np.ndarray, ...]]
    markers: list[tuple[np.ndarray, tuple[float, ...]]] = field(default_factory=list)


class Simulator:
    """Plays and pictures episodes of one task; slow to make, so made once and used for many seeds.

    Args:
        task: name out of Meta-World's version 3 tasks, such as ``"drawer-open-v3"``.
        settings: see :class:`Settings`.

    Raises:
        ValueError: ``task`` is unknown.
        ImportError: ``metaworld`` or ``mujoco`` is missing.
        RuntimeError: no OpenGL context can be made.
    """

    def __init__(self, task: str, settings: Settings) -> None:
        choose_gl()
        self._mujoco = _load_mujoco()
        require("metaworld", extra="sim")
        env_dict = require("metaworld.env_dict", extra="sim")
        self._policies = require("metaworld.policies", extra="sim").ENV_POLICY_MAP
        self.task, self.settings = task, settings
        classes = env_dict.ALL_V3_ENVIRONMENTS
        if task not in classes:
            raise ValueError(f"task {task!r} is none of {', '.join(sorted(classes))}")
        self.scene: SharedScene | None = None
        if settings.same_start and SCENES.get(task) in SHARED_SCENES:
            self.scene = SHARED_SCENES[SCENES[task]]
        self.env = self._make_env(classes[task])
        self._arm_at = np.array([self.env.model.joint(n).qposadr[0] for n in _ARM_JOINTS])
        self._object_at = np.setdiff1d(np.arange(self.env.model.nq), self._arm_at)
        self._pristine = {name: getattr(self.env.model, name).copy() for name in _MODEL_ARRAYS}
        self._renderer: Any = None
        self._area = 1
        self._arm: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def _make_env(self, environment: type) -> Any:
        if self.scene is not None and self.scene.model is not None:
            paths = require("metaworld.asset_path_utils", extra="sim")
            model = paths.full_V3_path_for(f"sawyer_xyz/{self.scene.model}.xml")
            environment = type(
                environment.__name__, (environment,), {"model_name": property(lambda _: model)}
            )
        env: Any = environment()
        # the goal is part of what the policy sees, as in Meta-World's multi-task benchmarks
        env._partially_observable = False
        if self.scene is not None:
            # observed goals are clipped to this box, which a scene's goals may leave
            box = require("gymnasium", extra="sim").spaces.Box
            env.goal_space = box(np.full(3, -2.0), np.full(3, 2.0), dtype=np.float64)
        env.__dict__.pop("sawyer_observation_space", None)
        env._set_task_called = True
        env.seeded_rand_vec = True
        return env

    def _draw(self, scene: SharedScene, seed: int) -> dict[str, np.ndarray]:
        name = SCENES[self.task]
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        for _ in range(10_000):
            values = {k: rng.uniform(low, high) for k, (low, high) in scene.variables.items()}
            for key, (source, offset) in scene.derived.items():
                values[key] = values[source] + np.asarray(offset)
            if all(
                np.linalg.norm(values[a][:2] - values[b][:2]) >= least
                for a, b, least in scene.apart
            ):
                return values
        raise RuntimeError(f"scene {name!r} leaves no room for its distances")

    def _reset(self, seed: int) -> tuple[np.ndarray, list[tuple[np.ndarray, tuple[float, ...]]]]:
        env, scene = self.env, self.scene
        for name, array in self._pristine.items():
            getattr(env.model, name)[:] = array
        if scene is None:
            env.seed(seed)
            env._freeze_rand_vec = False
            env.reset_model()
            env._freeze_rand_vec = True
            observation, _ = env.reset()
            return observation, []
        values = self._draw(scene, seed)
        env.hand_init_pos = np.asarray(scene.hand)
        env._last_rand_vec = np.concatenate([values[name] for name in scene.vectors[self.task]])
        env._freeze_rand_vec = True
        env.reset()
        for body, name in scene.bodies.items():
            env.model.body(body).pos = values[name]
        # what a task's own reset leaves behind in the arm and the object differs a little from
        # task to task; a shared beginning must not
        data = env.data
        if self._arm is None:
            self._arm = self._settle_arm()
        data.qpos[:] = env.model.qpos0
        data.qpos[self._arm_at], data.mocap_pos[:], data.mocap_quat[:] = self._arm
        data.qvel[:] = 0.0
        if scene.place is not None:
            value = values[scene.place]
            data.qpos[self._object_at[: len(value)]] = value
        self._mujoco.mj_forward(env.model, env.data)
        env._prev_obs = env._get_curr_obs_combined_no_goal()
        observation = env._get_obs().astype(np.float64)
        for name in _GOAL_SITES:
            self._hide(name)
        return observation, [(values[name], colour) for name, colour in scene.markers.items()]

    def _settle_arm(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        env, mujoco = self.env, self._mujoco
        data = mujoco.MjData(env.model)
        contact = mujoco.mjtDisableBit.mjDSBL_CONTACT
        env.model.opt.disableflags |= int(contact)
        kept, env.data = env.data, data
        try:
            env._reset_hand()
        finally:
            env.data = kept
            env.model.opt.disableflags &= ~int(contact)
        return data.qpos[self._arm_at].copy(), data.mocap_pos.copy(), data.mocap_quat.copy()

    def _hide(self, site: str) -> None:
        index = self._mujoco.mj_name2id(self.env.model, self._mujoco.mjtObj.mjOBJ_SITE, site)
        if index >= 0:
            self.env.model.site_rgba[index, 3] = 0.0

    def play(self, seed: int) -> Episode:
        """Play the episode of one seed; the same seed gives the same episode in any order.

        Args:
            seed: decides where objects and goals lie.
        """
        env, settings = self.env, self.settings
        with warnings.catch_warnings():
            # the scripted policies ask for more than the arm can do, and say so at every step
            warnings.simplefilter("ignore")
            observation, markers = self._reset(seed)
            policy = self._policies[self.task]()
            poses = [self._pose()]
            first: int | None = None
            while True:
                done = len(poses) - 1
                if first is None and done >= settings.max_steps:
                    break
                enough = max(settings.tail + (first or 0), settings.num_frames - 1)
                if first is not None and done >= enough:
                    break
                action = np.clip(policy.get_action(observation), -1.0, 1.0)
                observation, _, _, truncated, info = env.step(action)
                poses.append(self._pose())
                if first is None and float(info["success"]) > 0.5:
                    first = len(poses) - 1
                if truncated:
                    break
        return Episode(first is not None, float(env.dt), poses, markers)

    def _pose(self) -> tuple[np.ndarray, ...]:
        data = self.env.data
        return tuple(getattr(data, name).copy() for name in _POSE_ARRAYS)

    def _make_renderer(self) -> Any:
        settings, model = self.settings, self.env.model
        longest = max(settings.height, settings.width)
        # small pictures: two samples a pixel and side, averaged, cost less than multisampling
        self._area = 2 if longest <= 256 else 1
        height, width = settings.height * self._area, settings.width * self._area
        model.vis.quality.offsamples = 0 if self._area > 1 else 4
        model.vis.quality.shadowsize = 1024 if longest <= 128 else 4096
        model.vis.global_.offheight = max(height, model.vis.global_.offheight)
        model.vis.global_.offwidth = max(width, model.vis.global_.offwidth)
        try:
            return self._mujoco.Renderer(model, height, width)
        except Exception as error:  # each platform fails in its own way
            raise _no_opengl(error) from error

    def picture(self, episode: Episode, steps: Sequence[int], camera: str) -> np.ndarray:
        """Pictures of chosen steps of an episode that this simulator has just played.

        Args:
            episode: what :meth:`play` returned last.
            steps: which of its poses.
            camera: name out of :data:`VIEWS` and :data:`MODEL_CAMERAS`.

        Returns:
            uint8 (len(steps), height, width, 3), RGB.
        """
        if self._renderer is None:
            self._renderer = self._make_renderer()
        env, settings = self.env, self.settings
        view: Any = camera
        if camera in VIEWS:
            preset = VIEWS[camera]
            view = self._mujoco.MjvCamera()
            view.type = self._mujoco.mjtCamera.mjCAMERA_FREE
            view.lookat[:] = preset.lookat
            view.distance, view.azimuth = preset.distance, preset.azimuth
            view.elevation = preset.elevation
            env.model.vis.global_.fovy = preset.fovy
        frames = np.empty((len(steps), settings.height, settings.width, 3), np.uint8)
        for row, step in enumerate(steps):
            for name, array in zip(_POSE_ARRAYS, episode.poses[step], strict=True):
                getattr(env.data, name)[:] = array
            self._renderer.update_scene(env.data, view)
            for position, colour in episode.markers:
                self._mark(position, colour)
            frame = self._renderer.render()
            if self._area > 1:
                area = self._area
                blocks = frame.reshape(settings.height, area, settings.width, area, 3)
                total = blocks.sum(axis=(1, 3), dtype=np.uint16)
                frame = ((total + area * area // 2) // (area * area)).astype(np.uint8)
            frames[row] = frame[::-1, ::-1] if camera == "corner" else frame
        return frames

    def _mark(self, position: np.ndarray, colour: Sequence[float]) -> None:
        scene = self._renderer.scene
        if scene.ngeom >= scene.maxgeom:
            return
        self._mujoco.mjv_initGeom(
            scene.geoms[scene.ngeom],
            self._mujoco.mjtGeom.mjGEOM_SPHERE,
            np.full(3, 0.02),
            np.asarray(position, np.float64),
            np.eye(3).ravel(),
            np.asarray([*colour, 1.0], np.float32),
        )
        scene.ngeom += 1

    def close(self) -> None:
        """Free the OpenGL context."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
