# Sourced by the batch scripts of this folder.
#
# run_ranks COMMAND...: start COMMAND on every task of the job, as one rank each. When the job gets a signal to stop
# (SIGUSR1, which --signal=B:USR1@N sends N seconds before the time limit; SIGTERM, when it is preempted), pass it on to
# the ranks, wait until they have saved, and requeue the job, unless they were complete or failed, or the job was
# cancelled.

run_ranks() {
    set +o posix # in POSIX mode, bash forgets the exit code of a process after the first wait
    local told=0 time_is_up=0 code=0 first ranks job=$SLURM_JOB_ID state preempted
    if [ -n "$SLURM_ARRAY_TASK_ID" ]; then # the number of one task is that of the whole array
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer reads it from the #SBATCH lines
    srun --kill-on-bad-exit=1 bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID \
        WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE; exec "$@"' rank "$@" &
    ranks=$!
    trap 'time_is_up=1; told=1; kill -USR1 $ranks' USR1 # srun forwards it to all tasks
    trap 'told=1; kill -USR1 $ranks' TERM
    while kill -0 $ranks 2>/dev/null; do # a signal interrupts the wait, not the ranks
        wait $ranks
    done
    wait $ranks || code=$?
    trap '' USR1 TERM
    state=$(scontrol show job "$job")
    preempted=$(sed -n 's/.* PreemptTime=\([0-9][^ ]*\).*/\1/p' <<<"$state")
    if [[ $preempted > $(sed -n 's/.*StartTime=\([0-9][^ ]*\).*/\1/p' <<<"$state") ]]; then
        told=1 # with a grace time SLURM tells the ranks alone, not this script
    fi
    if [ $told = 0 ] || { [ $code != 85 ] && [ $code -le 128 ]; }; then # 85: saved; above 128: ended by a signal
        return $code
    fi
    if [[ $state == *JobState=* && $state != *JobState=RUNNING* && $state != *Reason=TimeLimit* ]]; then
        echo "stopped: job $job was cancelled, or SLURM has requeued it; if it is gone, submit it again to resume"
        return $code
    fi
    if [ $time_is_up = 1 ] && [ $code != 85 ] && [ $SECONDS -lt 120 ] && [ "${SLURM_RESTART_COUNT:-0}" -ge 2 ]; then
        echo "error: job $job was told to stop $SECONDS s after its start, again before it could save. Make --time at" \
            "least some minutes longer than the seconds in --signal."
        return $code
    fi
    echo "stopped: job $job goes back into the queue"
    scontrol requeue "$job"
}
