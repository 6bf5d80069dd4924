#!/usr/bin/env bash
# Once, after the container was made: the servers and the browser, then the environment as `make` sets it up.
set -euo pipefail
cd "$(dirname "$0")/.."

sudo=$(command -v sudo || true)
printf '#!/bin/sh\nexit 101\n' | $sudo tee /usr/sbin/policy-rc.d >/dev/null # installing a server does not start it
$sudo chmod +x /usr/sbin/policy-rc.d
$sudo apt-get update -qq
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    redis-server rabbitmq-server postgresql prometheus chromium fonts-dejavu-core make git
$sudo rm /usr/sbin/policy-rc.d

make .venv/.ready PYTHON="$(command -v python3.11)"
.venv/bin/mlops doctor
