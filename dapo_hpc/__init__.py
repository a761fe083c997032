"""DAPO reinforcement learning of language models, native to Slurm.

    prompts -- lease --> actor: vLLM samples G responses --> reward -- submit --> buffer
                           ^                                                        |
                           |                                                      take
                           |                                                        v
                           +--------- weights, by policy version <-- publish -- learner

Three kinds of process: one learner (Megatron-Core), a fleet of actors (vLLM), one durable buffer
between them. The folders of this package are named after the stages, in the order of the flow:
prompts, rollout, reward, buffer, learner, weights.
"""

__version__ = "0.1.0"
