"""Several processes, one run: who takes part, checks at the start, stopping together, an end for all when one fails.

Which process this is, is said by flags of `dino-jax train` and `dino-jax eval`, else by the environment, else found out:

    --coordinator=HOST:PORT   JAX_COORDINATOR_ADDRESS   where process 0 listens; the same for all
    --processes=N             JAX_NUM_PROCESSES         1: alone, whatever the surroundings say
    --process=I               JAX_PROCESS_ID            0 to N - 1; in a Kubernetes Job or JobSet (completionMode:
                                                        Indexed) JOB_COMPLETION_INDEX will do
                              JAX_LOCAL_DEVICE_IDS      of a GPU machine with several processes: mine, such as 0,1
    nothing                   SLURM_*                   under `srun` with more than one task
                              TPU_WORKER_HOSTNAMES ...  TPU pods and slices, on Compute Engine (metadata server) and GKE
                                                        (variables of its TPU webhook, MEGASCALE_*), by JAX itself

How long to wait before giving up, in seconds, for all of these ways:

    DINO_START_TIMEOUT        300   for all processes to come, and for each of the start-up checks
    DINO_HEARTBEAT_TIMEOUT     60   of silence before a process counts as dead and the runtime aborts the others

Exit status: 0 done, or stopped by SIGTERM or Ctrl-C with a checkpoint written (the same command resumes); 2 bad input, a
mismatch between processes among it; 1 any other failure of this process or another one. The reason is one line on the
standard error of the process that failed and of process 0.
"""
