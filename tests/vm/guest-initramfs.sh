#!/bin/busybox sh
# First process of the virtual machine: makes the host's root file system its root, read-only below a layer in
# memory that takes all writes. When it ends by an error, the kernel panics and the machine stops.
set -e
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /dev /proc /host /layer /newroot
mount -t devtmpfs dev /dev
mount -t proc proc /proc
for module in /modules/*; do
	insmod "$module"
done
# Nobody changes the host's files on our account, so caching them without asking again is safe.
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose host /host
mount -t tmpfs -o mode=0755,size=75% layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work root /newroot
mount -t tmpfs -o mode=0755 run /newroot/run
mkdir /newroot/run/guest
cp /guest/* /newroot/run/guest
mount --move /dev /newroot/dev
umount /proc
exec switch_root /newroot /bin/bash /run/guest/boot
