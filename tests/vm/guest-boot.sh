# Runs as process 1 on the host's root file system: mounts what an ordinary boot would have, runs the command,
# reports its output and exit code through two virtio ports, and stops the machine.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
ln -sf /proc/self/fd /dev/fd
for name in in out err; do
	ln -sf "/proc/self/fd/std$name" "/dev/std$name"
done
. /run/guest/settings
mkdir -p "/lib/modules/$(uname -r)"
mount --bind "$GUEST_MODULES" "/lib/modules/$(uname -r)"
# Makes /dev/net/tun.
modprobe tun
hostname guest
ip link set lo up
ulimit -n 65536
# Should nobody be there any more to end QEMU.
(sleep "$GUEST_TIMEOUT" && echo b >/proc/sysrq-trigger) &
port() {
	for folder in /sys/class/virtio-ports/*; do
		[ "$(cat "$folder/name")" = "$1" ] && echo "/dev/${folder##*/}"
	done
}
# A port can be open only once, so the command writes to a pipe, which its children may open again.
setsid bash /run/guest/command </dev/null 2>&1 | cat >"$(port output)"
echo "${PIPESTATUS[0]}" >"$(port status)"
# -no-reboot turns this into the end of QEMU, on every machine type.
echo b >/proc/sysrq-trigger
