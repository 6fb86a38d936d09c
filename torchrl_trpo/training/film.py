"""Films of a policy; no display is needed."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torchrl._utils import logger
from torchrl.envs import EnvBase, SerialEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_trpo.envs.checks import EnvironmentFault
from torchrl_trpo.errors import SettingError, require
from torchrl_trpo.networks.recurrent import carry_states
from torchrl_trpo.reporting.record import replacing
from torchrl_trpo.training.policy import make_run_env

FRAMES_PER_SECOND = 20


def film_run(
    config: Mapping[str, Any],
    policy: TensorDictModuleBase,
    path: Path,
    *,
    seed: int,
    device: torch.device,
    deterministic: bool = True,
    episodes: int = 4,
    shrink: float = 1.0,
    every: int = 1,
) -> Path | None:
    """Films episodes of a run's policy in the run's environment.

    Args:
        config: the run's settings, as in its ``config.yaml``.
        policy: the policy, for observations that are not normalised
            (:func:`~torchrl_trpo.training.policy.on_raw_observations`).
        path: the film's file, ``.mp4`` or ``.gif``.

    Keyword Args:
        seed: the seed of the environments' randomness.
        device: the policy's device.
        deterministic: whether the policy acts deterministically; otherwise it samples.
        episodes: the number of episodes, which are shown side by side.
        shrink: by how much the film is smaller than usual.
        every: how many steps there are from one picture to the next.

    Returns:
        The path; or None, after a warning, if the environment cannot be played or drawn, or the film cannot be written.
    """
    try:
        stage = make_run_env(config, num_envs=episodes, seed=seed, device=device, render=True)
    except (SettingError, EnvironmentFault) as error:
        logger.warning(f"No film: {error}")
        return None
    try:
        if stage.batch_size != (episodes,):
            logger.warning(f"No film: the factory makes {stage.batch_size[0]} environments, and not {episodes}.")
            return None
        carry_states(stage, policy)
        settings: dict[str, Any] = {"deterministic": deterministic, "shrink": shrink, "every": every}
        return film_episodes(stage, policy, path, max_steps=config["env"]["max_steps"], **settings)
    except Exception as error:  # a film must not cost a run its summary
        logger.warning(f"No film: {type(error).__name__}: {error}")
        return None
    finally:
        stage.close(raise_if_closed=False)


def film_episodes(
    env: EnvBase,
    policy: TensorDictModuleBase,
    path: Path,
    *,
    max_steps: int,
    deterministic: bool = True,
    shrink: float = 1.0,
    every: int = 1,
) -> Path | None:
    """Films one episode in each environment of a batch, side by side.

    VMAS's own renderer draws the frames if it finds OpenGL; on a server without it, matplotlib draws them from the
    world's state. Other simulators have their own renderers. An episode that ends early stays at its last frame.

    Args:
        env: an environment in TorchRL transforms, made with ``render=True``; four environments make a film of two by
            two.
        policy: the policy.
        path: the film's file, ``.mp4`` or ``.gif``.

    Keyword Args:
        max_steps: the maximal length of an episode, in steps.
        deterministic: whether the policy acts deterministically; otherwise it samples.
        shrink: by how much the film is smaller than usual.
        every: how many steps there are from one picture to the next; the film runs at the same speed.

    Returns:
        The path; or None, after a warning, if the environment cannot be drawn or the film cannot be written.
    """
    data = env.reset()
    num_envs = env.batch_size[0]
    try:
        render = _choose_renderer(env.base_env, shrink * math.ceil(num_envs**0.5))
        render(0)
    except Exception as error:  # its type depends on the simulator and on what is missing
        logger.warning(f"No film: the environment cannot be drawn here ({type(error).__name__}: {error}).")
        return None
    require("recipes", "imageio", "imageio_ffmpeg", importer=__name__)
    import imageio.v2 as imageio  # here, so that --help does not wait for it

    settings: dict[str, Any] = {"fps": FRAMES_PER_SECOND / every, "output_params": ["-preset", "veryfast"]}
    if is_gif := path.suffix == ".gif":
        settings = {"duration": 1000 * every / FRAMES_PER_SECOND, "loop": 0}  # again and again
    tiles: list[np.ndarray] = []
    running = [True] * num_envs
    acting = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    film: Any
    try:
        with torch.no_grad(), set_exploration_type(acting), replacing(path) as new:
            with _told():
                film = imageio.get_writer(new, **settings)
            try:
                for step in range(max_steps + 1):
                    if step % every == 0 or not any(running):
                        tiles = [render(index) if running[index] else tiles[index] for index in range(num_envs)]
                        with _told():
                            film.append_data(_few_colors(_mosaic(tiles)) if is_gif else _mosaic(tiles))
                    if step == max_steps or not any(running):
                        break
                    data = env.step(policy(data).set("_step", torch.tensor(running)))["next"]
                    for index, done in enumerate(data["done"].flatten().tolist()):
                        if running[index] and done:
                            tiles[index], running[index] = render(index), False
            finally:
                with _told():
                    film.close()
            if not new.exists():
                raise _NotWritten("the encoder has left no file")
    except _NotWritten as error:
        logger.warning(f"No film: {path} cannot be written ({error}).")
        return None
    return path


class _NotWritten(Exception):
    """A film cannot be written: a full disk, or what an encoder raises."""


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Raises what an encoder raises, of a type of its own, as _NotWritten."""
    try:
        yield
    except Exception as error:
        raise _NotWritten(f"{type(error).__name__}: {error}") from error


def _choose_renderer(env: Any, shrink: float) -> Callable[[int], np.ndarray]:
    """The function that draws one environment of a batch, given its index, smaller by a factor."""
    if isinstance(env, SerialEnv):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame, without a display
        # The public env.render() would draw all environments, also those whose episode has ended.
        return lambda index: _shrink(np.asarray(env._envs[index].render()), max(1, round(shrink)))
    if not hasattr(env, "scenario"):
        raise NotImplementedError(f"{type(env).__name__} has no method render of a single environment")
    size = env.scenario.viewer_size
    env.scenario.viewer_size = tuple(int(each / shrink) for each in size)  # read when the first picture is drawn
    try:
        env.render(mode="rgb_array")
    except Exception as error:  # its type depends on which part of OpenGL is missing
        logger.info(f"VMAS's renderer is not available here ({type(error).__name__}); drawing with matplotlib.")
        return lambda index: draw_world(env, index, int(560 / shrink))
    finally:
        env.scenario.viewer_size = size
    return lambda index: np.asarray(env.render(mode="rgb_array", env_index=index))


def draw_world(simulator: Any, env_index: int = 0, pixels: int = 560) -> np.ndarray:
    """Draws one environment of a VMAS simulator from its world's state, without OpenGL.

    Args:
        simulator: the VMAS environment, also in TorchRL's wrapper.
        env_index: which environment of the batch.
        pixels: width and height of the picture.

    Returns:
        The picture, uint8 ``[pixels, pixels, 3]``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, Rectangle
    from matplotlib.transforms import Affine2D

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
        colors = torch.as_tensor(entity.color)
        color = tuple(float(part) for part in (colors[env_index] if colors.ndim > 1 else colors))
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


def _shrink(picture: np.ndarray, factor: int) -> np.ndarray:
    """Shrinks a picture by averaging, so that thin lines stay visible."""
    from PIL import Image  # of imageio

    return np.asarray(Image.fromarray(picture).reduce(factor))


def _few_colors(picture: np.ndarray) -> np.ndarray:
    """Rounds to 64 colors, which take two thirds of the bytes in a GIF."""
    from PIL import Image  # of imageio

    return np.asarray(Image.fromarray(picture).quantize(64, dither=Image.Dither.NONE).convert("RGB"))


def _mosaic(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Arranges pictures in a square, cropped to a multiple of 16 pixels, which video codecs need."""
    columns = math.ceil(len(tiles) ** 0.5)
    blank = np.full_like(tiles[0], 255)
    padded = [*tiles, *[blank] * (-len(tiles) % columns)]
    rows = [np.concatenate(padded[start : start + columns], axis=1) for start in range(0, len(padded), columns)]
    picture = np.concatenate(rows)
    height, width = (size // 16 * 16 for size in picture.shape[:2])
    return picture[:height, :width]
