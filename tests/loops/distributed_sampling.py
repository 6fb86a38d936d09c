"""HATRPO with sampling in two other processes, which TorchRL's `submitit` and `ray` backends put on other machines."""

from tests.loops import hatrpo


def train(**settings):
    # Buffers would keep the layout of what per-agent networks output; gloo sends contiguous tensors only.
    options = {"launcher": "mp", "collector_kwargs": {"use_buffers": False}}
    yield from hatrpo.train(workers=2, backend="distributed", sync=True, backend_options=options, **settings)


if __name__ == "__main__":
    for _, data in train():
        returns = data["next", "agents", "episode_reward"][data["next", "done"].squeeze(-1)]
        print(f"episode return {returns.mean():.1f}")
