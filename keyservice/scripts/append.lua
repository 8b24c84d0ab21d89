-- Append revocations to the log. KEYS: log, epoch. ARGV: number, nonce, then per entry the eight fields that the caller
-- knows (id, kind, issuer, value, before, expires_at, reason, region). Returns {first seq, last seq, at (ms)}.
local refusal = check_epoch(KEYS[2], ARGV[1], ARGV[2])
if refusal then
  return refusal
end

local at = server_ms()
local auto_id = ARGV[1] .. '-*'
local first, last
for i = 3, #ARGV, 8 do
  last = redis.call('XADD', KEYS[1], auto_id,
    'v', '1', 'id', ARGV[i], 'kind', ARGV[i + 1], 'issuer', ARGV[i + 2], 'value', ARGV[i + 3],
    'before', ARGV[i + 4], 'expires_at', ARGV[i + 5], 'reason', ARGV[i + 6], 'at', at, 'region', ARGV[i + 7])
  first = first or last
end
return {string.match(first, '-(%d+)$'), string.match(last, '-(%d+)$'), at}
