-- Open the epoch: from now on entries in it are acknowledged. The caller has counted who merged. A beat is issued anew,
-- because only beats of an open epoch count. KEYS: epoch, beat, log. ARGV: number, nonce. Returns {1}, {0} if it was open.
local refusal = check_epoch(KEYS[1], ARGV[1], ARGV[2])
if refusal then
  return refusal
end
local held = redis.call('HMGET', KEYS[1], 'open', 'chain')
if held[1] == '1' then
  return {0}
end

local chain = decode_links(held[2])
chain[#chain].opened = true
redis.call('HSET', KEYS[1], 'open', '1', 'chain', encode_links(chain))
write_beat(KEYS[2], KEYS[1], KEYS[3], ARGV[1], ARGV[2], server_ms())
return {1}
