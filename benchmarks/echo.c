/* The yardstick: answers each message with the same bytes, as fast as libmosquitto can.
 *
 *     echo PORT STATE_TOPIC ACTION_TOPIC
 *
 * It does what an agent would do if thinking took no time: one client, one thread, TCP_NODELAY, QoS as received.
 */
#include <mosquitto.h>
#include <stdio.h>
#include <stdlib.h>

static const char *state_topic, *action_topic;

static void connected(struct mosquitto *client, void *context, int reason) {
    (void)context;
    if (reason) exit(1);
    mosquitto_subscribe(client, NULL, state_topic, 1);
}

static void subscribed(struct mosquitto *client, void *context, int packet, int count, const int *granted) {
    (void)client, (void)context, (void)packet, (void)count, (void)granted;
    puts("ready");
    fflush(stdout);
}

static void arrived(struct mosquitto *client, void *context, const struct mosquitto_message *message) {
    (void)context;
    mosquitto_publish(client, NULL, action_topic, message->payloadlen, message->payload, message->qos, false);
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    state_topic = argv[2];
    action_topic = argv[3];
    mosquitto_lib_init();
    struct mosquitto *client = mosquitto_new(NULL, true, NULL);
    if (!client) return 1;
    mosquitto_int_option(client, MOSQ_OPT_TCP_NODELAY, 1);
    mosquitto_connect_callback_set(client, connected);
    mosquitto_subscribe_callback_set(client, subscribed);
    mosquitto_message_callback_set(client, arrived);
    if (mosquitto_connect(client, "127.0.0.1", atoi(argv[1]), 60)) return 1;
    return mosquitto_loop_forever(client, -1, 1) ? 1 : 0;
}
