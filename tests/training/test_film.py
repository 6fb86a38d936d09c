"""Films with VMAS's renderer, and without any OpenGL."""

from __future__ import annotations

from typing import ClassVar

import gymnasium
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torchrl.envs import GymWrapper

from torchrl_trpo.envs import make_env
from torchrl_trpo.keys import group_keys
from torchrl_trpo.networks import make_actor
from torchrl_trpo.training.film import draw_world, film_episodes

# imageio's reader leaves the pipes of ffmpeg to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def env():
    return make_env("vmas/balance", num_envs=3, max_steps=8, kwargs={"n_agents": 4}, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("opengl", [True, False])
def test_a_film_needs_no_display(opengl, env, tmp_path, monkeypatch):
    simulator = env.base_env._env
    if not opengl:

        def render(**_):
            raise ImportError('Library "GL" not found.')

        monkeypatch.setattr(simulator, "render", render)
    path = film_episodes(env, make_actor(env, *group_keys(env), share_params=True), tmp_path / "film.mp4", max_steps=8)
    frames = imageio.imread(path)
    assert len(frames) == 9
    assert frames[0].std() > 1, "something is drawn"
    assert np.abs(frames[0].astype(float) - frames[-1]).max() > 20, "and it moves"


class Bar(gymnasium.Env):
    """Shows how many of its steps are done, and has two to four; it refuses a step after the last one."""

    metadata: ClassVar = {"render_modes": ["rgb_array"]}
    observation_space = Box(-1, 1, (1,))
    action_space = Discrete(2)
    render_mode = "rgb_array"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.steps = int(self.np_random.integers(2, 5))
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.left > 0, "the episode has ended"
        self.left -= 1
        return np.zeros(1, np.float32), 1.0, self.left == 0, False, {}

    def render(self):
        return np.full((64, 64, 3), 255 * (self.steps - self.left) // self.steps, np.uint8)


def make_bar(**kwargs):
    return GymWrapper(Bar(), device="cpu")


@pytest.mark.parametrize("every", [1, 3])
def test_a_film_shows_how_each_episode_ends(every, tmp_path):
    """The last picture was never drawn, and environments were stepped after their end, which may be an error."""
    settings = {"factory": "tests.training.test_film.make_bar", "kwargs": {}, "max_steps": 9, "device": "cpu"}
    env = make_env("custom", num_envs=4, seed=0, **settings)
    policy = make_actor(env, *group_keys(env), share_params=True)
    path = film_episodes(env, policy, tmp_path / "film.gif", max_steps=9, every=every)
    first, *_, last = imageio.imread(path)
    assert first.max() == 0
    assert last.min() == 255


def test_a_film_that_cannot_be_written_is_a_warning(env, tmp_path, monkeypatch, caplog):
    """It ended the run, and the film of before was lost."""
    path = tmp_path / "film.mp4"
    path.write_text("the one before")
    monkeypatch.setattr("torchrl_trpo.training.film._mosaic", lambda _: np.zeros((0, 0, 3), np.uint8))
    actor = make_actor(env, *group_keys(env), share_params=True)
    assert film_episodes(env, actor, path, max_steps=2) is None
    assert f"No film: {path} cannot be written" in caplog.text
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("film.mp4", "the one before")]


def test_drawings_show_the_world(env):
    """Every entity's colour is in the picture, at the place where the world has it."""
    env.reset()
    simulator = env.base_env._env
    picture = draw_world(simulator)
    assert picture.shape == (560, 560, 3)
    package = next(entity for entity in simulator.world.entities if entity.name == "package")
    zoom = simulator.scenario.viewer_zoom
    column, row = (280 * (1 + sign * float(x) / zoom) for sign, x in zip((1, -1), package.state.pos[0], strict=True))
    pixel = picture[round(row), round(column)] / 255
    assert pixel == pytest.approx(package.color, abs=0.02)


@pytest.mark.parametrize("scenario", ["navigation", "transport", "football", "give_way", "simple_spread"])
def test_other_scenarios_can_be_drawn(scenario):
    """Colours are tuples in some scenarios and tensors in others, such as navigation with four agents."""
    env = make_env(f"vmas/{scenario}", num_envs=1, max_steps=3, kwargs={}, seed=0, device=torch.device("cpu"))
    env.rollout(3)
    assert draw_world(env.base_env._env).std() > 1
