"""What the simulated episodes are about: tasks, sentences, and scenes that several tasks share.

Task names are those of Meta-World (Yu et al., 2019; version 3 environments). A *scene* is a set of
tasks that look alike, such as opening and closing a drawer. Meta-World itself begins such tasks
differently (the drawer to be closed begins open), so that a first frame alone gives the task away.
A :class:`SharedScene` gives all its tasks one and the same beginning, so that only the sentence
tells them apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

Vector = tuple[float, ...]

#: tasks that are rendered when none are named
DEFAULT_TASKS: tuple[str, ...] = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "push-back-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "door-open-v3",
    "door-close-v3",
    "window-open-v3",
    "window-close-v3",
    "faucet-open-v3",
    "faucet-close-v3",
    "coffee-push-v3",
    "coffee-pull-v3",
    "coffee-button-v3",
    "plate-slide-v3",
    "plate-slide-back-v3",
    "plate-slide-side-v3",
    "plate-slide-back-side-v3",
    "handle-press-v3",
    "handle-pull-v3",
    "handle-press-side-v3",
    "handle-pull-side-v3",
    "door-lock-v3",
    "door-unlock-v3",
    "button-press-v3",
    "button-press-topdown-v3",
    "button-press-wall-v3",
    "lever-pull-v3",
    "dial-turn-v3",
    "sweep-into-v3",
)

#: task -> sentences that say it; the first is the plainest
CAPTIONS: dict[str, tuple[str, ...]] = {
    "reach-v3": (
        "reach the red marker",
        "move the gripper to the red ball",
        "bring the robot hand to the red target and leave the puck alone",
        "the arm reaches for the red point",
    ),
    "push-v3": (
        "push the puck to the green marker",
        "slide the puck over the table to the green target",
        "shove the red puck onto the green point",
        "the arm pushes the puck towards the green ball",
    ),
    "pick-place-v3": (
        "pick up the puck and bring it to the blue marker",
        "lift the puck to the blue target",
        "grasp the red puck and hold it at the blue ball",
        "the arm picks the puck up and places it at the blue point",
    ),
    "push-back-v3": (
        "pull the puck back to the yellow marker",
        "drag the puck towards the robot onto the yellow target",
        "bring the puck back to the yellow point",
        "the arm pushes the puck backwards to the yellow ball",
    ),
    "drawer-open-v3": (
        "open the drawer",
        "pull the drawer open by its handle",
        "slide the green drawer out",
        "the arm pulls out the drawer",
    ),
    "drawer-close-v3": (
        "close the drawer",
        "push the drawer shut",
        "slide the green drawer back in",
        "the arm pushes the drawer in until it is closed",
    ),
    "door-open-v3": (
        "open the door",
        "pull the door open by its handle",
        "swing the safe door outwards",
        "the arm opens the door of the box",
    ),
    "door-close-v3": (
        "close the door",
        "push the door shut",
        "swing the safe door back to the box",
        "the arm closes the door of the box",
    ),
    "window-open-v3": (
        "open the window",
        "slide the window to the right",
        "push the window handle to open it",
        "the arm slides the window open",
    ),
    "window-close-v3": (
        "close the window",
        "slide the window to the left",
        "push the window handle to shut it",
        "the arm slides the window closed",
    ),
    "faucet-open-v3": (
        "open the faucet",
        "turn the faucet on",
        "rotate the tap handle counterclockwise",
        "the arm turns the red tap handle to open it",
    ),
    "faucet-close-v3": (
        "close the faucet",
        "turn the faucet off",
        "rotate the tap handle clockwise",
        "the arm turns the red tap handle to close it",
    ),
    "coffee-push-v3": (
        "push the mug under the coffee machine",
        "slide the cup to the coffee machine",
        "place the mug below the spout",
        "the arm pushes the white mug to the machine",
    ),
    "coffee-pull-v3": (
        "pull the mug away from the coffee machine",
        "drag the cup back from the coffee machine",
        "take the mug away to the green marker",
        "the arm pulls the white mug towards itself",
    ),
    "coffee-button-v3": (
        "press the button of the coffee machine",
        "start the coffee machine",
        "push the button on the coffee maker",
        "the arm presses the coffee button",
    ),
    "plate-slide-v3": (
        "slide the plate into the goal",
        "push the puck forward into the net",
        "shoot the black disc into the cage ahead",
        "the arm slides the plate away into the net",
    ),
    "plate-slide-back-v3": (
        "slide the plate back out of the goal",
        "pull the puck back from the net",
        "drag the black disc backwards towards the robot",
        "the arm slides the plate back",
    ),
    "plate-slide-side-v3": (
        "slide the plate sideways into the goal",
        "push the puck to the side into the net",
        "shoot the black disc into the cage on the left",
        "the arm slides the plate left into the net",
    ),
    "plate-slide-back-side-v3": (
        "slide the plate sideways out of the goal",
        "pull the puck to the side out of the net",
        "drag the black disc right, away from the cage",
        "the arm slides the plate right and out of the net",
    ),
    "handle-press-v3": (
        "press the handle down",
        "push down the handle",
        "lower the red handle",
        "the arm presses the handle downwards",
    ),
    "handle-pull-v3": (
        "pull the handle up",
        "lift the handle",
        "raise the red handle",
        "the arm pulls the handle upwards",
    ),
    "handle-press-side-v3": (
        "press the side handle down",
        "push down the handle that faces sideways",
        "lower the red handle on the left",
        "the arm presses the sideways handle downwards",
    ),
    "handle-pull-side-v3": (
        "pull the side handle up",
        "lift the handle that faces sideways",
        "raise the red handle on the left",
        "the arm pulls the sideways handle upwards",
    ),
    "door-lock-v3": (
        "lock the door",
        "turn the lock clockwise to lock the door",
        "rotate the lock down",
        "the arm locks the door",
    ),
    "door-unlock-v3": (
        "unlock the door",
        "turn the lock counterclockwise to unlock the door",
        "rotate the lock to the side",
        "the arm unlocks the door",
    ),
    "button-press-v3": (
        "press the button on the front",
        "push the red button of the box from the front",
        "press the button of the box",
        "the arm pushes the button in",
    ),
    "button-press-topdown-v3": (
        "press the button from above",
        "push the red button on top of the box down",
        "press down the button",
        "the arm presses the button from the top",
    ),
    "button-press-wall-v3": (
        "press the button behind the wall",
        "reach over the wall and push the button",
        "go around the wall to press the red button",
        "the arm passes the wall and pushes the button in",
    ),
    "lever-pull-v3": (
        "pull the lever up",
        "lift the lever",
        "rotate the red lever upwards",
        "the arm pulls the lever",
    ),
    "dial-turn-v3": (
        "turn the dial",
        "rotate the dial",
        "turn the round knob",
        "the arm rotates the dial",
    ),
    "sweep-v3": (
        "sweep the block off the table",
        "push the block to the right edge of the table",
        "sweep the cube aside",
        "the arm sweeps the block to the right",
    ),
    "sweep-into-v3": (
        "sweep the block into the hole",
        "push the cube into the hole in the table",
        "slide the block to the hole",
        "the arm sweeps the cube into the hole",
    ),
    "assembly-v3": (
        "put the ring onto the peg",
        "place the wrench over the peg",
        "assemble the nut and the peg",
        "the arm picks up the ring and sets it on the peg",
    ),
    "basketball-v3": (
        "put the ball into the basket",
        "dunk the basketball",
        "drop the ball through the hoop",
        "the arm brings the basketball to the hoop",
    ),
    "bin-picking-v3": (
        "move the cube to the other bin",
        "pick the cube from one bin and put it into the other",
        "take the block to the right bin",
        "the arm carries the cube between the bins",
    ),
    "box-close-v3": (
        "close the box with the lid",
        "put the cover on the box",
        "place the lid onto the box",
        "the arm grasps the cover and closes the box",
    ),
    "button-press-topdown-wall-v3": (
        "press the button on top behind the wall",
        "reach over the wall and press the button down",
        "push down the red button beyond the wall",
        "the arm passes the wall and presses the button from above",
    ),
    "disassemble-v3": (
        "take the ring off the peg",
        "lift the wrench from the peg",
        "remove the nut from the peg",
        "the arm pulls the ring up and off the peg",
    ),
    "hand-insert-v3": (
        "insert the hand into the hole",
        "reach down into the hole in the table",
        "put the gripper into the hole",
        "the arm lowers its hand into the hole",
    ),
    "hammer-v3": (
        "hit the nail with the hammer",
        "hammer the nail in",
        "pick up the hammer and drive in the nail",
        "the arm hammers the nail on the box",
    ),
    "pick-out-of-hole-v3": (
        "pick the puck out of the hole",
        "lift the puck from the hole",
        "take the object out of the hole",
        "the arm pulls the puck out of the hole",
    ),
    "pick-place-wall-v3": (
        "pick up the puck and bring it over the wall",
        "lift the puck over the wall to the target",
        "carry the puck across the wall",
        "the arm picks the puck up and passes the wall with it",
    ),
    "peg-insert-side-v3": (
        "insert the peg sideways",
        "put the peg into the hole in the block",
        "plug the peg in from the side",
        "the arm pushes the peg into the block",
    ),
    "peg-unplug-side-v3": (
        "unplug the peg sideways",
        "pull the peg out of the block",
        "take the plug out to the side",
        "the arm pulls the peg from the block",
    ),
    "push-wall-v3": (
        "push the puck around the wall",
        "slide the puck past the wall to the target",
        "move the puck on the table beyond the wall",
        "the arm pushes the puck by the wall",
    ),
    "reach-wall-v3": (
        "reach over the wall",
        "move the gripper past the wall to the red marker",
        "bring the hand over the wall to the target",
        "the arm reaches beyond the wall",
    ),
    "shelf-place-v3": (
        "put the block on the shelf",
        "place the cube onto the shelf",
        "pick up the block and set it on the shelf",
        "the arm lifts the cube to the shelf",
    ),
    "soccer-v3": (
        "kick the ball into the goal",
        "push the soccer ball into the goal",
        "score a goal",
        "the arm rolls the ball into the goal",
    ),
    "stick-pull-v3": (
        "pull the box with the stick",
        "hook the container with the stick and pull it",
        "use the stick to drag the thermos back",
        "the arm grasps the stick and pulls the container",
    ),
    "stick-push-v3": (
        "push the box with the stick",
        "use the stick to push the container",
        "shove the thermos with the stick",
        "the arm grasps the stick and pushes the container",
    ),
}


@dataclass(frozen=True)
class SharedScene:
    """One beginning for several tasks; lengths in metres, angles in radians.

    Args:
        variables: name -> (low, high); drawn uniformly, once a seed, for all tasks together.
        vectors: task -> names whose values, in turn, make its reset vector.
        derived: name -> (name, offset): a value that follows from another one.
        apart: (name, name, distance): drawn again until these lie so far apart on the table.
        hand: where the gripper begins.
        bodies: body -> name of its position in its parent, applied after the reset.
        place: name of the initial coordinates of the object's first joints (position of a loose
            object, opening of a drawer, angle of a door), applied after the reset.
        model: model file (without ``.xml``) that all the tasks use in place of their own.
        markers: name -> colour (red, green, blue); drawn in every episode of the scene, whichever
            of them is its goal. Meta-World's own goal marks are hidden.
    """

    variables: Mapping[str, tuple[Vector, Vector]]
    vectors: Mapping[str, tuple[str, ...]]
    derived: Mapping[str, tuple[str, Vector]] = field(default_factory=dict)
    apart: tuple[tuple[str, str, float], ...] = ()
    hand: Vector = (0.0, 0.6, 0.2)
    bodies: Mapping[str, str] = field(default_factory=dict)
    place: str | None = None
    model: str | None = None
    markers: Mapping[str, Vector] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that begin alike."""
        return tuple(self.vectors)


SHARED_SCENES: dict[str, SharedScene] = {
    "tabletop": SharedScene(
        variables={
            "puck": ((-0.1, 0.65, 0.02), (0.1, 0.7, 0.02)),
            "reach": ((-0.15, 0.75, 0.08), (0.15, 0.9, 0.3)),
            "push": ((-0.1, 0.82, 0.02), (0.1, 0.9, 0.02)),
            "pick": ((-0.1, 0.8, 0.12), (0.1, 0.9, 0.25)),
            "back": ((-0.1, 0.48, 0.02), (0.1, 0.52, 0.02)),
        },
        vectors={
            "reach-v3": ("puck", "reach"),
            "push-v3": ("puck", "push"),
            "pick-place-v3": ("puck", "pick"),
            "push-back-v3": ("puck", "back"),
        },
        apart=(
            ("puck", "reach", 0.15),
            ("puck", "push", 0.15),
            ("puck", "pick", 0.15),
            ("puck", "back", 0.15),
            ("reach", "push", 0.08),
            ("reach", "pick", 0.1),
            ("push", "pick", 0.08),
        ),
        place="puck",
        model="sawyer_push_v3",
        markers={
            "reach": (0.8, 0.0, 0.0),
            "push": (0.0, 0.8, 0.0),
            "pick": (0.0, 0.0, 0.8),
            "back": (0.9, 0.8, 0.0),
        },
    ),
    "drawer": SharedScene(
        variables={
            "drawer": ((-0.1, 0.9, 0.0), (0.1, 0.9, 0.0)),
            "slide": ((-0.12,), (-0.09,)),
        },
        vectors={"drawer-open-v3": ("drawer",), "drawer-close-v3": ("drawer",)},
        place="slide",
    ),
    "door": SharedScene(
        variables={
            "door": ((0.0, 0.85, 0.15), (0.1, 0.95, 0.15)),
            "angle": ((-0.8,), (-0.6,)),
        },
        vectors={"door-open-v3": ("door",), "door-close-v3": ("door",)},
        hand=(-0.2, 0.6, 0.2),
        place="angle",
    ),
    "window": SharedScene(
        variables={
            "window": ((-0.1, 0.75, 0.16), (0.1, 0.9, 0.16)),
            "slide": ((0.08,), (0.12,)),
        },
        vectors={"window-open-v3": ("window",), "window-close-v3": ("window",)},
        hand=(0.0, 0.5, 0.2),
        place="slide",
    ),
    "faucet": SharedScene(
        variables={"faucet": ((-0.05, 0.8, 0.0), (0.05, 0.85, 0.0))},
        vectors={"faucet-open-v3": ("faucet",), "faucet-close-v3": ("faucet",)},
        hand=(0.0, 0.5, 0.2),
    ),
    "coffee": SharedScene(
        variables={
            "mug": ((-0.1, 0.6, 0.0), (0.1, 0.63, 0.0)),
            "push": ((-0.05, 0.75, 0.0), (0.05, 0.78, 0.0)),
            "pull": ((-0.1, 0.43, 0.0), (0.1, 0.45, 0.0)),
        },
        derived={"machine": ("push", (0.0, 0.22, 0.0))},
        vectors={
            "coffee-push-v3": ("mug", "push"),
            "coffee-pull-v3": ("mug", "pull"),
            "coffee-button-v3": ("machine",),
        },
        apart=(("mug", "push", 0.15), ("mug", "pull", 0.15)),
        hand=(0.0, 0.5, 0.2),
        bodies={"coffee_machine": "machine"},
        place="mug",
        markers={"pull": (0.0, 0.8, 0.0)},
    ),
    "plate": SharedScene(
        variables={
            "plate": ((0.0, 0.08), (0.0, 0.12)),
            "front": ((0.0, 0.6, 0.0), (0.0, 0.6, 0.0)),
            "net": ((-0.1, 0.88, 0.0), (0.1, 0.9, 0.0)),
            "far": ((0.0, 0.85, 0.0), (0.0, 0.85, 0.0)),
            "back": ((0.0, 0.6, 0.015), (0.0, 0.6, 0.015)),
        },
        vectors={
            "plate-slide-v3": ("front", "net"),
            "plate-slide-back-v3": ("far", "back"),
        },
        bodies={"puck_goal": "net"},
        place="plate",
    ),
    "plate-side": SharedScene(
        variables={
            "plate": ((-0.12, 0.0), (-0.08, 0.0)),
            "right": ((0.0, 0.6, 0.0), (0.0, 0.6, 0.0)),
            "net": ((-0.3, 0.54, 0.0), (-0.27, 0.66, 0.0)),
            "left": ((-0.25, 0.6, 0.0), (-0.25, 0.6, 0.0)),
            "back": ((0.0, 0.6, 0.015), (0.05, 0.6, 0.015)),
        },
        vectors={
            "plate-slide-side-v3": ("right", "net"),
            "plate-slide-back-side-v3": ("left", "back"),
        },
        bodies={"puck_goal": "net"},
        place="plate",
    ),
    "handle": SharedScene(
        variables={
            "box": ((-0.1, 0.8, 0.0), (0.1, 0.9, 0.0)),
            "slide": ((-0.055,), (-0.045,)),
        },
        vectors={"handle-press-v3": ("box",), "handle-pull-v3": ("box",)},
        place="slide",
    ),
    "handle-side": SharedScene(
        variables={
            "box": ((-0.35, 0.65, 0.0), (-0.25, 0.75, 0.0)),
            "slide": ((-0.055,), (-0.045,)),
        },
        vectors={"handle-press-side-v3": ("box",), "handle-pull-side-v3": ("box",)},
        place="slide",
    ),
    "door-lock": SharedScene(
        variables={
            "door": ((-0.1, 0.8, 0.15), (0.1, 0.85, 0.15)),
            "angle": ((0.7,), (0.9,)),
        },
        vectors={"door-lock-v3": ("door",), "door-unlock-v3": ("door",)},
        place="angle",
    ),
}

#: task -> scene that it shares with others; a task of its own scene stands under its own name
SCENES: dict[str, str] = {
    **{task: task.removesuffix("-v3") for task in CAPTIONS},
    **{task: name for name, scene in SHARED_SCENES.items() for task in scene.tasks},
}
