#!/bin/bash
# What a mini cluster needs, from Debian or Ubuntu. A second run does nothing. No service is started.
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge slurmdbd mariadb-server iproute2 util-linux)
services=(slurmctld slurmd slurmdbd munge mariadb)
policy=/usr/sbin/policy-rc.d

refuse() { echo "make slurm-install: $*" >&2; exit 1; }

is_installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

command -v apt-get >/dev/null && command -v dpkg-query >/dev/null || refuse \
  "there is no apt on this machine; it knows Debian's package names only. Install slurmctld, slurmd," \
  "slurmdbd, Slurm's commands, munge and MariaDB by other means; \`make slurm-up\` then finds them."

missing=()
for package in "${packages[@]}"; do is_installed "$package" || missing+=("$package"); done
if [ ${#missing[@]} = 0 ]; then echo "everything is installed: ${packages[*]}"; exit 0; fi

[ "$(id -u)" = 0 ] || refuse \
  "not root, and not installed: ${missing[*]}. Run it as root, or ask who runs this machine."

# Debian starts what it installs, unless this file says no.
if [ ! -e $policy ]; then
  trap 'rm -f $policy' EXIT
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod 755 $policy
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || refuse "apt-get update failed; see above. Is there a way to the package server?"
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
  refuse "apt-get could not install ${missing[*]}; see above."

# Nor may they start at the next boot: a mini cluster has daemons of its own.
if command -v systemctl >/dev/null; then
  for service in "${services[@]}"; do
    case " ${missing[*]} " in *" $service"*) systemctl disable -q "$service" 2>/dev/null || true ;; esac
  done
fi
echo "installed: ${missing[*]} ($(slurmctld -V))"
