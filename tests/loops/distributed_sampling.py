"""HATRPO with sampling in two other processes, which TorchRL's `submitit` and `ray` backends put on other machines."""

from tests.loops import hatrpo


def train(**settings):
    buffers = {"use_buffers": False}  # batches of vectorised environments are contiguous only so, as gloo needs them
    options = {"launcher": "mp", "collector_kwargs": buffers}
    yield from hatrpo.train(workers=2, backend="distributed", sync=True, backend_options=options, **settings)


if __name__ == "__main__":
    for _, data in train():
        returns = data["next", "agents", "episode_reward"][data["next", "done"].squeeze(-1)]
        print(f"episode return {returns.mean():.1f}")
