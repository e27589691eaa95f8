# SPDX-License-Identifier: Apache-2.0
"""Ray Train, one process a worker.   python launch/ray_train.py --config imdb_lm --workdir
/shared/runs/imdb_lm

Ray joins the workers by jax.distributed before it calls `work`. All workers must see the work
directory.
"""

import sys

from flax_lstm.__main__ import call, guarded


def work(settings: dict) -> None:
    status = guarded(call("train", "ray_train.py"), settings["arguments"])
    if status:
        raise SystemExit(status)  # Ray starts the workers again, and they resume


def main(arguments: list[str]) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer

    trainer = JaxTrainer(
        train_loop_per_worker=work,
        train_loop_config={"arguments": arguments},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=True, resources_per_worker={"GPU": 8}),
        # TPUs: ScalingConfig(num_workers=4, use_tpu=True, topology="4x4",
        # accelerator_type="TPU-V6E")
        run_config=RunConfig(failure_config=FailureConfig(max_failures=20)),
    )
    trainer.fit()


if __name__ == "__main__":
    main(sys.argv[1:])
