#!/bin/bash
# Open MPI, from the first machine of the host file.   launch/open_mpi.sh 16 hosts --config imdb_lm
# Version 5 does not tell the processes where the first is: hence --coordinator.
processes=$1 hosts=$2
shift 2
exec mpirun -np "$processes" --hostfile "$hosts" python train.py --coordinator "$(hostname):8476" "$@"
