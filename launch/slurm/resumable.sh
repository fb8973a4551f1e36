# Sourced by the batch scripts of this folder.
#
# run_ranks COMMAND...: start COMMAND on every task of the job, as one rank each. When the job gets a signal to stop
# (SIGUSR1, which --signal=B:USR1@N sends N seconds before the time limit; SIGTERM, when it is preempted), pass it on to
# the ranks, wait until they have saved, and requeue the job, unless they were complete or failed.

run_ranks() {
    set +o posix # in POSIX mode, bash forgets the exit code of a process after the first wait
    local told=0 code=0 first ranks
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer reads it from the #SBATCH lines
    srun --kill-on-bad-exit=1 bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID \
        WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE; exec "$@"' rank "$@" &
    ranks=$!
    trap 'told=1; kill -USR1 $ranks' USR1 TERM # srun forwards it to all tasks
    while kill -0 $ranks 2>/dev/null; do # a signal interrupts the wait, not the ranks
        wait $ranks
    done
    wait $ranks || code=$?
    trap - USR1 TERM
    if [ $told = 1 ] && { [ $code = 85 ] || [ $code -gt 128 ]; }; then # 85: saved; above 128: ended by a signal
        echo "stopped: job $SLURM_JOB_ID goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
        return 0
    fi
    return $code
}
