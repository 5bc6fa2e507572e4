/* A load generator that takes little of what it measures: both ends of requests over TCP, and a sender of UDP
 * packets. One thread, epoll, no allocation while it runs.
 *
 *   load serve PORT
 *       answers every REQUEST bytes by ANSWER bytes on TCP.
 *   load sink PORT answer|silent
 *       takes UDP packets and reads none, but for the first: that it answers, or not.
 *   load ask SOURCE TARGET PORT CONNECTIONS SECONDS keep|new
 *       `keep`: one request after the other on each connection; `new`: a connection for each request.
 *       Prints {"requests", "seconds", "p50_us", "p99_us"}; the first tenth of the time does not count.
 *   load flood SOURCE TARGET PORT PACKETS SIZE answer|silent
 *       asks a sink of the same kind, then prints {"ns"}: time of a UDP packet, the median over batches. Between network namespaces that is the whole way of a packet, to
 *       the receiver's socket: the kernel goes it in the sender's context.
 *
 * Addresses are numeric, of either family. */
#define _GNU_SOURCE
#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define REQUEST 100
#define ANSWER 200
#define BATCH 200
#define MAX_SLOTS 256
#define MAX_SAMPLES (8 << 20)
#define SECOND 1000000000ull

struct slot {
	int fd;
	int connecting;
	size_t got;
	uint64_t began;
};

static char bytes[65536];

static _Noreturn void fail(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * SECOND + time.tv_nsec;
}

static struct addrinfo *resolve(const char *host, const char *port)
{
	struct addrinfo hints = { .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV | AI_PASSIVE }, *found;

	if (getaddrinfo(host, port, &hints, &found)) {
		fprintf(stderr, "no numeric address: %s\n", host);
		exit(1);
	}
	return found;
}

static void set(int fd, int level, int option, int value)
{
	if (setsockopt(fd, level, option, &value, sizeof(value)))
		fail("setsockopt");
}

static void follow(int epoll, int fd, uint32_t events, void *data)
{
	struct epoll_event event = { .events = events, .data.ptr = data };

	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		fail("epoll_ctl");
}

/* Serve */

static int listen_on(const char *port, int type)
{
	struct addrinfo *any = resolve("::", port);
	int fd = socket(AF_INET6, type, 0);

	if (fd < 0)
		fail("socket");
	set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
	set(fd, IPPROTO_IPV6, IPV6_V6ONLY, 0);
	if (type == SOCK_DGRAM)
		set(fd, SOL_SOCKET, SO_RCVBUF, 1);
	if (bind(fd, any->ai_addr, any->ai_addrlen))
		fail("bind");
	if (type == SOCK_STREAM && listen(fd, 4096))
		fail("listen");
	freeaddrinfo(any);
	return fd;
}

/* Whether the connection goes on. */
static int answer(struct slot *slot)
{
	ssize_t count = recv(slot->fd, bytes, sizeof(bytes), MSG_DONTWAIT);

	if (count <= 0)
		return count < 0 && (errno == EAGAIN || errno == EINTR);
	for (slot->got += count; slot->got >= REQUEST; slot->got -= REQUEST)
		if (send(slot->fd, bytes, ANSWER, MSG_NOSIGNAL) != ANSWER)
			return 0;
	return 1;
}

static int serve(const char *port)
{
	struct epoll_event events[64];
	int listener = listen_on(port, SOCK_STREAM), epoll = epoll_create1(0);

	follow(epoll, listener, EPOLLIN, NULL);
	printf("ready\n");
	fflush(stdout);
	for (;;) {
		int count = epoll_wait(epoll, events, 64, -1);

		for (int i = 0; i < count; i++) {
			struct slot *slot = events[i].data.ptr;

			if (!slot) {
				int fd = accept(listener, NULL, NULL);

				if (fd < 0)
					continue;
				set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
				slot = calloc(1, sizeof(*slot));
				slot->fd = fd;
				follow(epoll, fd, EPOLLIN, slot);
			} else if (!answer(slot)) {
				close(slot->fd);
				free(slot);
			}
		}
	}
}

static int sink(const char *port, int answers)
{
	struct sockaddr_storage from;
	socklen_t length = sizeof(from);
	int fd = listen_on(port, SOCK_DGRAM);
	ssize_t got;

	printf("ready\n");
	fflush(stdout);
	got = recvfrom(fd, bytes, sizeof(bytes), 0, (struct sockaddr *)&from, &length);
	if (answers && sendto(fd, bytes, got, 0, (struct sockaddr *)&from, length) < 0)
		fail("sendto");
	for (;;)
		pause();
}

/* Ask */

static struct addrinfo *source, *target;

static void request(struct slot *slot)
{
	slot->got = 0;
	if (send(slot->fd, bytes, REQUEST, MSG_NOSIGNAL) != REQUEST)
		fail("send");
}

static void begin(struct slot *slot, int epoll)
{
	slot->fd = socket(target->ai_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
	if (slot->fd < 0)
		fail("socket");
	set(slot->fd, IPPROTO_TCP, TCP_NODELAY, 1);
	set(slot->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1);
	if (bind(slot->fd, source->ai_addr, source->ai_addrlen))
		fail("bind");
	slot->began = now();
	slot->connecting = 1;
	if (connect(slot->fd, target->ai_addr, target->ai_addrlen) && errno != EINPROGRESS)
		fail("connect");
	follow(epoll, slot->fd, EPOLLOUT, slot);
}

static void end(struct slot *slot)
{
	/* By RST: ports must not be used up by connections that wait for late packets. */
	struct linger linger = { .l_onoff = 1 };

	setsockopt(slot->fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
	close(slot->fd);
}

static int compare(const void *one, const void *other)
{
	uint32_t a = *(const uint32_t *)one, b = *(const uint32_t *)other;

	return (a > b) - (a < b);
}

static int ask(int connections, double seconds, int anew)
{
	static struct slot slots[MAX_SLOTS];
	struct epoll_event events[MAX_SLOTS];
	uint32_t *samples = malloc(MAX_SAMPLES * sizeof(*samples));
	uint64_t start = now(), counts_from = start + seconds * SECOND / 10, until = start + seconds * SECOND;
	size_t count = 0;
	int epoll = epoll_create1(0);

	if (connections < 1 || connections > MAX_SLOTS || !samples)
		return 2;
	for (int i = 0; i < connections; i++)
		begin(&slots[i], epoll);
	for (uint64_t time = start; time < until;) {
		int ready = epoll_wait(epoll, events, MAX_SLOTS, 1000);

		if (!ready && now() > until + SECOND) {
			fprintf(stderr, "no answer\n");
			return 1;
		}
		for (int i = 0; i < ready; i++) {
			struct slot *slot = events[i].data.ptr;
			ssize_t got;

			if (slot->connecting) {
				struct epoll_event event = { .events = EPOLLIN, .data.ptr = slot };
				int error = 0;
				socklen_t length = sizeof(error);

				getsockopt(slot->fd, SOL_SOCKET, SO_ERROR, &error, &length);
				if (error) {
					errno = error;
					fail("connect");
				}
				slot->connecting = 0;
				epoll_ctl(epoll, EPOLL_CTL_MOD, slot->fd, &event);
				if (!anew)
					slot->began = now();
				request(slot);
				continue;
			}
			got = recv(slot->fd, bytes, ANSWER - slot->got, MSG_DONTWAIT);
			if (got < 0 && errno == EAGAIN)
				continue;
			if (got <= 0)
				fail("recv");
			slot->got += got;
			if (slot->got < ANSWER)
				continue;
			time = now();
			if (time >= counts_from && time < until && count < MAX_SAMPLES)
				samples[count++] = time - slot->began;
			if (anew) {
				end(slot);
				begin(slot, epoll);
			} else {
				slot->began = time;
				request(slot);
			}
		}
		if (!ready)
			time = now();
	}
	for (int i = 0; i < connections; i++)
		end(&slots[i]);
	if (!count) {
		fprintf(stderr, "no answer\n");
		return 1;
	}
	qsort(samples, count, sizeof(*samples), compare);
	printf("{\"requests\": %zu, \"seconds\": %.6f, \"p50_us\": %.3f, \"p99_us\": %.3f}\n", count,
	       (until - counts_from) / 1e9, samples[count / 2] / 1e3, samples[count * 99 / 100] / 1e3);
	return 0;
}

static int flood(long packets, int size, int answered)
{
	int fd = socket(target->ai_family, SOCK_DGRAM, 0);
	struct timeval patience = { .tv_sec = 2 };
	uint32_t *samples = malloc((packets / BATCH + 1) * sizeof(*samples));
	size_t count = 0;

	if (!samples || fd < 0 || bind(fd, source->ai_addr, source->ai_addrlen) ||
	    connect(fd, target->ai_addr, target->ai_addrlen))
		fail("connect");
	if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)))
		fail("setsockopt");
	if (send(fd, bytes, size, 0) != size || (answered && recv(fd, bytes, sizeof(bytes), 0) < 0))
		fail("first packet");
	for (long sent = 0; sent < packets; sent += BATCH) {
		uint64_t start = now();

		for (int i = 0; i < BATCH; i++)
			if (send(fd, bytes, size, 0) != size)
				fail("send");
		samples[count++] = now() - start;
	}
	qsort(samples, count, sizeof(*samples), compare);
	printf("{\"ns\": %.2f}\n", (double)samples[count / 2] / BATCH);
	return 0;
}

int main(int count, char **words)
{
	signal(SIGPIPE, SIG_IGN);
	if (count == 3 && !strcmp(words[1], "serve"))
		return serve(words[2]);
	if (count == 4 && !strcmp(words[1], "sink"))
		return sink(words[2], !strcmp(words[3], "answer"));
	if (count >= 5) {
		source = resolve(words[2], "0");
		target = resolve(words[3], words[4]);
	}
	if (count == 8 && !strcmp(words[1], "ask"))
		return ask(atoi(words[5]), atof(words[6]), !strcmp(words[7], "new"));
	if (count == 8 && !strcmp(words[1], "flood"))
		return flood(atol(words[5]), atoi(words[6]), !strcmp(words[7], "answer"));
	fprintf(stderr, "usage: see the top of load.c\n");
	return 2;
}
