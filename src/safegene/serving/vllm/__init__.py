"""The adapter under vLLM, as a plugin: nothing of vLLM is patched.

plugin          what vLLM loads in each of its processes: names of architectures, nothing heavy
architectures   vLLM's models with an adapter inside, and the one that refuses
config_json     a block "safegene" in config.json asks for them
protection      where gate and interventions sit in them; which weights they accept; what is watched while they serve
operator        gate and intervention as two operators that compilers leave alone
arming, guard   which adapter and calibration; which configurations of vLLM cannot be protected
worker, proof   proof before the first request that the adapter changes what it must change
health          around vLLM's server: no listening before the proof, `/health`, key, limits, audit log
deadline        answers that take too long
launch          `safegene serve --engine vllm`
"""
