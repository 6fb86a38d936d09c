"""Films of a policy in a VMAS environment, with or without a display."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from matplotlib.transforms import Affine2D
from tensordict.nn import TensorDictModuleBase
from torchrl._utils import logger
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

FRAMES_PER_SECOND = 20


def film_episode(env: EnvBase, policy: TensorDictModuleBase, path: Path, *, max_steps: int) -> Path:
    """Films one episode of the first environment, acting deterministically.

    VMAS's own renderer draws the frames where it finds OpenGL; elsewhere, on a bare server, they are drawn from the
    world's state with matplotlib.

    Args:
        env: a VMAS environment in TorchRL transforms, with at least one environment in its batch.
        policy: the policy.
        path: where the film goes, an ``.mp4`` or ``.gif`` file.

    Keyword Args:
        max_steps: the episode's length at most, in steps.

    Returns:
        The path.
    """
    simulator = env.base_env._env
    render = _choose_renderer(simulator)
    frames: list[np.ndarray] = []
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        data = env.reset()
        frames.append(render())
        for _ in range(max_steps):
            data = env.step(policy(data))
            frames.append(render())
            if bool(data["next", "done"][0].any()):
                break
            data = data["next"].exclude("reward")
    imageio.mimsave(path, [_even(frame) for frame in frames], fps=FRAMES_PER_SECOND)
    return path


def _choose_renderer(simulator: Any) -> Callable[[], np.ndarray]:
    try:
        simulator.render(mode="rgb_array")
    except Exception as error:  # what is raised depends on which part of OpenGL is missing
        logger.info(f"VMAS's renderer is not available here ({type(error).__name__}); drawing with matplotlib.")
        return lambda: draw_world(simulator)
    return lambda: np.asarray(simulator.render(mode="rgb_array"))


def draw_world(simulator: Any, env_index: int = 0, pixels: int = 560) -> np.ndarray:
    """Draws one environment of a VMAS simulator from its world's state, without OpenGL.

    Args:
        simulator: the VMAS environment.
        env_index: which environment of the batch.
        pixels: width and height of the picture.

    Returns:
        The picture, uint8 ``[pixels, pixels, 3]``.
    """
    figure = Figure(figsize=(pixels / 100, pixels / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    origin = [float(x) for x in simulator.scenario.render_origin]
    positions = torch.stack([agent.state.pos[env_index] for agent in simulator.world.agents])
    offset = positions - positions.new_tensor(origin)
    reach = max(float(simulator.scenario.viewer_zoom), float(offset.abs().max()) + 0.1)
    axes.set_xlim(origin[0] - reach, origin[0] + reach)
    axes.set_ylim(origin[1] - reach, origin[1] + reach)
    axes.set_aspect("equal")
    for entity in simulator.world.entities:
        if not bool(entity.is_rendering[env_index]):
            continue
        x, y = (float(value) for value in entity.state.pos[env_index])
        shape = entity.shape
        color = torch.as_tensor(entity.color)
        color = tuple(float(part) for part in (color[env_index] if color.ndim > 1 else color))
        turn = Affine2D().rotate(float(entity.state.rot[env_index])).translate(x, y) + axes.transData
        if hasattr(shape, "radius"):
            axes.add_patch(Circle((x, y), shape.radius, color=color))
        elif hasattr(shape, "hollow"):
            corner = (-shape.length / 2, -shape.width / 2)
            filled = not shape.hollow
            axes.add_patch(Rectangle(corner, shape.length, shape.width, color=color, fill=filled, transform=turn))
        else:
            axes.plot([-shape.length / 2, shape.length / 2], [0, 0], color=color, lw=shape.width, transform=turn)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _even(frame: np.ndarray) -> np.ndarray:
    """Crops to sizes that are multiples of 16, as video codecs want them."""
    height, width = (size // 16 * 16 for size in frame.shape[:2])
    return frame[:height, :width]
